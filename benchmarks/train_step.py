"""What a meta-training step costs: forward, backward and AdamW of all weights in bf16, by every strategy.

    python -m benchmarks.train_step [--batches 4 8] [--length 1024]

The reference is a textbook implementation in the same process. At the first batch size every strategy runs, at the
second the one that a GPU is best used with, for more and more write steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from gradmem_adapter import GradMemConfig
from gradmem_adapter.training.graphed_step import GraphedStep
from gradmem_adapter.training.speed import compiled_layers, maskless_attention

from . import common, textbook

COLUMNS = ("method", "batch", "length", "write_steps", "milliseconds", "first_milliseconds", "peak_gib", "error")
STRATEGIES = ("finite_difference", "exact", "first_order")
HOW = ("eager", "compiled", "graph")


def tokens(args: argparse.Namespace, batch: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(args.vocabulary, (batch, args.length + args.query), device=args.device)
    return rows[:, : args.length], rows[:, args.length :]


def trainable(args: argparse.Namespace, attention: str) -> Any:
    return common.backbone(args, attention=attention).float().requires_grad_(True)


def optimizer_step(args: argparse.Namespace, parameters: list[Any], loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def by_the_textbook(args: argparse.Namespace, batch: int, steps: int) -> common.Cost:
    backbone = trainable(args, "eager")
    slots = nn.Parameter(0.02 * torch.randn(args.memory, backbone.config.hidden_size, device=args.device))
    context, query = tokens(args, batch)
    loss = partial(textbook.outer_loss, backbone, slots, context, query, steps, 0.03)
    return common.measure(optimizer_step(args, [slots, *backbone.parameters()], loss), args.device, args.repeats)


def by_us(args: argparse.Namespace, strategy: str, how: str, batch: int, steps: int) -> common.Cost:
    config = GradMemConfig(
        num_memory_tokens=args.memory, write_steps=steps, write_lr=0.03, train_backbone=True, meta_gradient=strategy
    )
    model: PeftModel = get_peft_model(trainable(args, "sdpa"), config)
    context, query = tokens(args, batch)
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return model(input_ids=query, labels=query, context_input_ids=context).loss

    def graphed_loss(kind: int) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return {"loss": loss()}

    with maskless_attention(model), compiled_layers(model, how != "eager"):
        if how != "graph":
            return common.measure(optimizer_step(args, parameters, loss), args.device, args.repeats)
        step = GraphedStep(graphed_loss, parameters)
        return common.measure(lambda: step(0, 1e-5), args.device, args.repeats, warm_up=3)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "train_step")
    parser.add_argument("--batches", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a context")
    parser.add_argument("--query", type=int, default=64, help="tokens of the query, all of them targets")
    parser.add_argument("--memory", type=int, default=8, help="memory vectors")
    parser.add_argument("--steps", type=int, nargs="*", default=[2, 1], help="write steps at the first batch size")
    parser.add_argument("--many-steps", type=int, nargs="*", default=[1, 2, 5, 10], help="at the second")
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--how", nargs="*", choices=HOW, default=HOW if torch.cuda.is_available() else HOW[:2])
    parser.add_argument("--vocabulary", type=int, default=49152, help="token ids are drawn below it")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    environment, rows = common.environment(args.device), []

    def run(method: str, batch: int, steps: int, function: Callable[[], common.Cost]) -> None:
        shape = {"method": method, "batch": batch, "length": args.length, "write_steps": steps}
        rows.append(shape | common.attempt(lambda: vars(function())) | environment)
        print(rows[-1], flush=True)

    small, large = args.batches
    for steps in args.steps:
        run("textbook", small, steps, partial(by_the_textbook, args, small, steps))
        for strategy in args.strategies:
            for how in args.how:
                if strategy != "exact" or how == "eager":  # compiled layers have no double backward
                    run(f"{strategy}, {how}", small, steps, partial(by_us, args, strategy, how, small, steps))
    for steps in args.many_steps:
        for how in dict.fromkeys((args.how[-1], args.how[0])):
            run(
                f"finite_difference, {how}", large, steps,
                partial(by_us, args, "finite_difference", how, large, steps),
            )  # fmt: skip
    common.show(rows, COLUMNS)
    common.append(args.output, rows)


if __name__ == "__main__":
    main()
