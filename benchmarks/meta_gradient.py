"""How close the meta-gradient strategies come to the exact one in float32, on real text.

    python -m benchmarks.meta_gradient --text wikitext.txt

Reports the cosine and the ratio of lengths of the gradients over all weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common, textbook
from gradmem_adapter import SMOLLM2, GradMemConfig, load_backbone
from gradmem_adapter.meta_gradients import STRATEGIES
from gradmem_adapter.peft_model import get_peft_model


class Gradients:
    """Outer gradients of one batch, computed in every way.

    Args:
        args (`Namespace`): the options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.backbone, tokenizer = load_backbone(args.model, device=args.device)
        ids = torch.tensor(tokenizer(Path(args.text).read_text(encoding="utf-8")[:200_000])["input_ids"])
        rows = ids[: args.batch * (args.length + args.query)].view(args.batch, -1).to(args.device)
        self.context, self.query = rows[:, : args.length], rows[:, args.length :]
        torch.manual_seed(args.seed)
        self.config = GradMemConfig(num_memory_tokens=args.memory, train_backbone=True, memory_init="vocab")
        self.model = get_peft_model(self.backbone, self.config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, steps: int) -> Tensor:
        """The outer loss after a number of write steps."""
        return self.model(
            input_ids=self.query, labels=self.query, context_input_ids=self.context, write_steps=steps
        ).loss

    def of(self, name: str, lr: float, bf16: bool = False, relative_step: float | None = None) -> Tensor:
        """The outer gradient over all weights, in float64, by a strategy or by the textbook."""
        self.config.write_lr, self.config.finite_difference_step = lr, relative_step
        with torch.autocast(torch.device(self.args.device).type, torch.bfloat16, enabled=bf16):
            if name == "textbook":
                self.backbone.set_attn_implementation("eager")
                slots = self.model.slots.gradmem_memory["default"]
                steps = self.args.write_steps
                loss = textbook.outer_loss(self.backbone, slots, self.context, self.query, steps, lr)
            else:
                self.config.meta_gradient = name
                loss = self.loss(self.args.write_steps)
        gradients = torch.autograd.grad(loss, self.parameters)
        self.backbone.set_attn_implementation("sdpa")
        return torch.cat([g.flatten().double() for g in gradients])


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of float32 in TF32."""
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "meta_gradient")
    parser.set_defaults(model=SMOLLM2, dtype="float32")
    parser.add_argument("--text", required=True, help="a file with real text")
    parser.add_argument("--memory", type=int, default=8, help="memory vectors")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a context")
    parser.add_argument("--query", type=int, default=64, help="tokens of the query, all of them targets")
    parser.add_argument("--write-steps", type=int, default=2)
    parser.add_argument("--lrs", type=float, nargs="*", default=[0.01, 0.03, 0.1])
    parser.add_argument("--steps-to-try", type=float, nargs="*", default=[3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 1e-1])
    parser.add_argument("--seed", type=int, default=0, help="which tokens the slots start from")
    args = parser.parse_args(argv)
    gradients = Gradients(args)

    for lr in args.lrs:
        exact = gradients.of("exact", lr)

        def compare(name: str, lr: float = lr, exact: Tensor = exact, **options: object) -> dict[str, float]:
            found = gradients.of(name, lr, **options)  # type: ignore[arg-type]
            cosine = F.cosine_similarity(found, exact, dim=0).item()
            return {"cosine": cosine, "norm_ratio": (found.norm() / exact.norm()).item()}

        def losses(lr: float = lr) -> dict[str, float]:
            gradients.config.write_lr = lr
            with torch.no_grad():
                before, after = (gradients.loss(steps).item() for steps in (0, args.write_steps))
            return {"outer_loss_before": before, "outer_loss_after": after}

        record = partial(
            common.record, args, "meta_gradient_accuracy", memory_tokens=args.memory, write_steps=args.write_steps,
            write_lr=lr, seed=args.seed,
        )  # fmt: skip
        record("write", losses)
        record("exact float32 by the textbook", partial(compare, "textbook"))
        for name in STRATEGIES:
            if name not in ("exact", "finite_difference"):  # the reference, and the one with several steps
                record(f"{name.replace('_', ' ')} float32", partial(compare, name))
        record("double backward bf16 by the textbook", partial(compare, "textbook", bf16=True))
        record("exact bf16", partial(compare, "exact", bf16=True))
        for e in args.steps_to_try:
            difference = partial(compare, "finite_difference", relative_step=e)
            record("finite difference float32", difference, relative_step=e)
            record("finite difference bf16", partial(difference, bf16=True), relative_step=e)
            if torch.device(args.device).type == "cuda":
                with tf32():
                    record("finite difference TF32", difference, relative_step=e)


if __name__ == "__main__":
    main()
