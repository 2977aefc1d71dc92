"""The meta-gradient strategies on SmolLM2-135M: how close to the exact one, and what a training step costs.

    python -m benchmarks.meta_gradient accuracy --backbone <directory, or package:...gguf> --text wikitext.txt
    python -m benchmarks.meta_gradient cost     (weights are random: cost does not depend on them)

One JSON object per line. The reference for cost is `benchmarks/textbook.py` in the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.textbook import outer_loss
from gradmem_adapter import SMOLLM2, GradMemConfig, load_backbone
from gradmem_adapter import meta_gradient as strategies
from gradmem_adapter.training.graphed_step import GraphedStep
from gradmem_adapter.training.speed import compiled_layers, maskless_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def report(**values: Any) -> None:
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(json.dumps(values | {"device": gpu, "torch": torch.__version__}), flush=True)


# ---------------------------------------------------------------- accuracy


def accuracy(args: argparse.Namespace) -> None:
    """Cosine of each strategy's gradient, over all weights, with the exact one in float32."""
    backbone, tokenizer = load_backbone(args.backbone, device=DEVICE)
    ids = torch.tensor(tokenizer(Path(args.text).read_text(encoding="utf-8")[:200_000])["input_ids"])
    rows = ids[: args.batch * (args.length + args.query)].view(args.batch, -1).to(DEVICE)
    context, query = rows[:, : args.length], rows[:, args.length :]
    torch.manual_seed(0)
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
            report(kind="accuracy", method=method, write_lr=lr, cosine=cosine, norm_ratio=ratio, **more)

        report(kind="write", write_lr=lr, outer_loss_before=losses[0], outer_loss_after=losses[1])
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


# ---------------------------------------------------------------- cost


def measure(step: Callable[[], None], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of a training step, and the peak memory of all of them, compiling and capturing included."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else float("nan")
    return {"milliseconds": 1000 * statistics.median(times), "peak_gib": peak}


def make(attention: str, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = SMOLLM2_135M | {"num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**fields, attn_implementation=attention)).to(DEVICE)


def trainer_step(parameters: list[Tensor], loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=DEVICE == "cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def cost(args: argparse.Namespace) -> None:
    """A training step of all weights: forward, backward, AdamW; bf16 mixed precision."""

    def tokens(batch: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(args.vocabulary, (batch, args.length + args.query), device=DEVICE)
        return rows[:, : args.length], rows[:, args.length :]

    def textbook(batch: int, steps: int) -> dict[str, float]:
        backbone = make("eager", args.layers)
        slots = torch.nn.Parameter(0.02 * torch.randn(args.memory, backbone.config.hidden_size, device=DEVICE))
        context, query = tokens(batch)
        return measure(
            trainer_step(
                [slots, *backbone.parameters()], lambda: outer_loss(backbone, slots, context, query, steps, 0.03)
            ),
            args.repeats,
        )

    def ours(name: str, batch: int, steps: int, how: str) -> dict[str, float]:
        backbone = make("sdpa", args.layers)
        config = GradMemConfig(
            num_memory_tokens=args.memory, write_steps=steps, write_lr=0.03, train_backbone=True, meta_gradient=name
        )
        model: PeftModel = get_peft_model(backbone, config)
        context, query = tokens(batch)
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]

        def loss() -> Tensor:
            return model(input_ids=query, labels=query, context_input_ids=context).loss

        def graphed_loss(kind: int) -> dict[str, Tensor]:
            with torch.autocast(DEVICE, torch.bfloat16):
                return {"loss": loss()}

        with maskless_attention(model), compiled_layers(model, how != "eager"):
            if how != "graph":
                return measure(trainer_step(parameters, loss), args.repeats)
            step = GraphedStep(graphed_loss, parameters)
            return measure(lambda: step(0, 1e-5), args.repeats, warm_up=3)

    def attempt(method: str, batch: int, steps: int, run: Callable[[], dict[str, float]]) -> None:
        shape = {"method": method, "batch": batch, "length": args.length, "write_steps": steps}
        try:
            report(kind="cost", **shape, **run())
        except torch.cuda.OutOfMemoryError:
            report(kind="cost", **shape, error="out of memory")
        except Exception as error:  # the others are still worth knowing
            report(kind="cost", **shape, error=str(error)[-300:])

    variants = (("finite_difference", "eager"), ("finite_difference", "compiled"), ("finite_difference", "graph"))
    others = (("exact", "eager"), ("first_order", "eager"), ("first_order", "graph"))
    small, large = args.batches
    for steps in (2, 1):
        attempt("textbook", small, steps, lambda steps=steps: textbook(small, steps))
        for name, how in variants + others:
            attempt(
                f"{name}, {how}", small, steps, lambda name=name, how=how, steps=steps: ours(name, small, steps, how)
            )
    for steps in args.many_steps:
        for name, how in variants[-1:]:
            attempt(
                f"{name}, {how}", large, steps, lambda name=name, how=how, steps=steps: ours(name, large, steps, how)
            )
    attempt("finite_difference, eager", large, 10, lambda: ours("finite_difference", large, 10, "eager"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("accuracy", accuracy), ("cost", cost)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--memory", type=int, default=8, help="memory vectors")
        command.add_argument("--query", type=int, default=64, help="tokens of the query, all of them targets")
        if name == "accuracy":
            command.add_argument("--backbone", default=SMOLLM2)
            command.add_argument("--text", required=True, help="a file with real text")
            command.add_argument("--batch", type=int, default=4)
            command.add_argument("--length", type=int, default=256, help="tokens of a context")
            command.add_argument("--write-steps", type=int, default=2)
            command.add_argument("--lrs", type=float, nargs="*", default=[0.01, 0.03, 0.1])
            command.add_argument("--steps-to-try", type=float, nargs="*", default=[3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 1e-1])
        else:
            command.add_argument("--length", type=int, default=1024)
            command.add_argument("--batches", type=int, nargs=2, default=[4, 8])
            command.add_argument("--many-steps", type=int, nargs="*", default=[1, 2, 5, 10])
            command.add_argument("--layers", type=int, default=30)
            command.add_argument("--vocabulary", type=int, default=49152)
            command.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
