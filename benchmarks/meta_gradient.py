"""How close the meta-gradient strategies come to the exact one in float32, on SmolLM2-135M and real text.

    python -m benchmarks.meta_gradient --text wikitext.txt

Cosine of the gradients over all weights. One JSON object per line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F

from benchmarks.textbook import outer_loss
from gradmem_adapter import SMOLLM2, GradMemConfig, load_backbone
from gradmem_adapter.meta_gradients import finite_difference as strategies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def report(**values: Any) -> None:
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(json.dumps(values | {"device": gpu, "torch": torch.__version__}), flush=True)


def accuracy(args: argparse.Namespace) -> None:
    """Cosine of each strategy's gradient, over all weights, with the exact one in float32."""
    backbone, tokenizer = load_backbone(args.backbone, device=DEVICE)
    ids = torch.tensor(tokenizer(Path(args.text).read_text(encoding="utf-8")[:200_000])["input_ids"])
    rows = ids[: args.batch * (args.length + args.query)].view(args.batch, -1).to(DEVICE)
    context, query = rows[:, : args.length], rows[:, args.length :]
    torch.manual_seed(args.seed)
    config = GradMemConfig(
        num_memory_tokens=args.memory, write_steps=args.write_steps, train_backbone=True, memory_init="vocab"
    )
    model = get_peft_model(backbone, config)
    slots = model.base_model.slots.gradmem_memory["default"]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_of(name: str, steps: int) -> Tensor:
        config.meta_gradient = name
        return model(input_ids=query, labels=query, context_input_ids=context, write_steps=steps).loss

    def flat(name: str, lr: float, bf16: bool = False, textbook: bool = False) -> Tensor:
        config.write_lr = lr
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            if textbook:
                backbone.set_attn_implementation("eager")
                loss = outer_loss(backbone, slots, context, query, args.write_steps, lr)
            else:
                loss = loss_of(name, args.write_steps)
        gradients = torch.autograd.grad(loss, parameters)
        backbone.set_attn_implementation("sdpa")
        return torch.cat([g.flatten().double() for g in gradients])

    for lr in args.lrs:
        config.write_lr = lr
        with torch.no_grad():
            losses = [loss_of("exact", steps).item() for steps in (0, args.write_steps)]
        exact = flat("exact", lr)

        def show(method: str, gradient: Tensor, lr: float = lr, exact: Tensor = exact, **more: Any) -> None:
            cosine, ratio = F.cosine_similarity(gradient, exact, dim=0).item(), (gradient.norm() / exact.norm()).item()
            report(kind="accuracy", method=method, seed=args.seed, write_lr=lr, cosine=cosine, norm_ratio=ratio, **more)

        report(kind="write", seed=args.seed, write_lr=lr, outer_loss_before=losses[0], outer_loss_after=losses[1])
        show("exact float32 by the textbook", flat("exact", lr, textbook=True))
        show("first order float32", flat("first_order", lr))
        show("double backward bf16 by the textbook", flat("exact", lr, bf16=True, textbook=True))
        show("exact bf16", flat("exact", lr, bf16=True))
        default = dict(strategies.RELATIVE_STEP)
        for e in args.steps_to_try:
            strategies.RELATIVE_STEP[torch.float32] = strategies.RELATIVE_STEP[torch.bfloat16] = e
            show("finite difference float32", flat("finite_difference", lr), relative_step=e)
            show("finite difference bf16", flat("finite_difference", lr, bf16=True), relative_step=e)
            if DEVICE == "cuda":
                torch.set_float32_matmul_precision("high")
                show("finite difference TF32", flat("finite_difference", lr), relative_step=e)
                torch.set_float32_matmul_precision("highest")
        strategies.RELATIVE_STEP.update(default)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=SMOLLM2)
    parser.add_argument("--text", required=True, help="a file with real text")
    parser.add_argument("--memory", type=int, default=8, help="memory vectors")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a context")
    parser.add_argument("--query", type=int, default=64, help="tokens of the query, all of them targets")
    parser.add_argument("--write-steps", type=int, default=2)
    parser.add_argument("--lrs", type=float, nargs="*", default=[0.01, 0.03, 0.1])
    parser.add_argument("--steps-to-try", type=float, nargs="*", default=[3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 1e-1])
    parser.add_argument("--seed", type=int, default=0, help="which tokens the slots start from")
    accuracy(parser.parse_args(argv))


if __name__ == "__main__":
    main()
