"""The cost of a meta-training step for every strategy: forward, backward and AdamW in bf16.

    python -m benchmarks.train_step [--batches 4 8] [--length 1024]
    python -m benchmarks.train_step --shape llama-3.1-8b --lora 16 --checkpointing 12 --batches 1 4 --micro-batch 1 \\
        --length 4096 --steps --many-steps 2 --how eager compiled

All weights are trained, or with `--lora`, a LoRA of that rank on all linear layers of a frozen model in `--dtype`. The
reference is a textbook implementation in the same process. At the first batch size every strategy runs; at the second,
the strategy that uses a GPU best runs with increasing numbers of write steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks import common, textbook
from gradmem_adapter import GradMemConfig
from gradmem_adapter.meta_gradients import STRATEGIES
from gradmem_adapter.peft_model import get_peft_model
from gradmem_adapter.training.compiled import compiled_layers
from gradmem_adapter.training.cuda_graph import GraphedBackward, maskless_attention
from gradmem_adapter.utils.backbone import layers_of

HOW = ("eager", "compiled", "graph")
"""Ways to run a step; "graph": compiled layers, forward and backward pass as one CUDA graph."""


def tokens(args: argparse.Namespace, model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Contexts and queries."""
    rows = common.random_tokens(model, batch, args.length + args.query)
    return rows[:, : args.length], rows[:, args.length :]


def trainable(args: argparse.Namespace, attention: str) -> Any:
    """The model with trainable float32 weights."""
    return common.backbone(args, attention=attention).float().requires_grad_(True)


def cost_of_a_step(
    losses: Sequence[Callable[[], Tensor]], model: nn.Module, how: str, args: argparse.Namespace
) -> common.Cost:
    """Time and memory of forward, backward and AdamW for all trainable weights, under autocast to bf16.

    Args:
        losses (`Sequence[Callable]`): the outer loss of each micro-batch, the same in each step; only one for "graph".
        model (`nn.Module`): the model to train.
        how (`str`): one of `HOW`.
        args (`Namespace`): the options of `common.parser`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def forward(loss: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            return loss() / len(losses)

    def table(batch: object) -> tuple[Tensor, Tensor]:
        value = forward(losses[0])
        return value, value.detach()

    graphed = GraphedBackward(table, parameters) if how == "graph" else None

    def step() -> None:
        optimizer.zero_grad()
        if graphed is not None:
            graphed({})
        else:
            for loss in losses:
                forward(loss).backward()
        optimizer.step()

    with ExitStack() as stack:
        stack.enter_context(maskless_attention(model))
        if how != "eager":
            stack.enter_context(compiled_layers(model, static=True))
        return common.measure(step, args.device, args.repeats, args.warm_up)


def by_the_textbook(args: argparse.Namespace, batch: int, steps: int) -> common.Cost:
    backbone = trainable(args, "eager")
    slots = nn.Parameter(0.02 * torch.randn(args.memory, backbone.config.hidden_size, device=args.device))
    context, query = tokens(args, backbone, batch)
    loss = partial(textbook.outer_loss, backbone, slots, context, query, steps, 0.03)
    return cost_of_a_step([loss], nn.ModuleList([nn.ParameterList([slots]), backbone]), "eager", args)


def by_us(args: argparse.Namespace, strategy: str, how: str, batch: int, steps: int) -> common.Cost:
    lora = LoraConfig(r=args.lora, target_modules="all-linear") if args.lora else None
    config = GradMemConfig(
        num_memory_tokens=args.memory, write_steps=steps, write_lr=0.03, train_backbone=lora is None, lora_config=lora,
        meta_gradient=strategy,
    )  # fmt: skip
    model = get_peft_model(trainable(args, "sdpa") if lora is None else common.backbone(args), config)
    if args.checkpointing:
        model.train()  # checkpointing needs it; the shapes have no dropout
        cast(Any, model.get_base_model()).gradient_checkpointing_enable({"use_reentrant": False})
        layers = layers_of(model)
        for number, layer in enumerate(layers):  # spread evenly, as by Transformers' `every_n_layers`
            layer.gradient_checkpointing = number * args.checkpointing % len(layers) < args.checkpointing
    contexts, queries = (rows.split(args.micro_batch or batch) for rows in tokens(args, model.get_base_model(), batch))

    def loss(context: Tensor, query: Tensor) -> Tensor:
        return model(input_ids=query, labels=query, context_input_ids=context).loss

    parts = [partial(loss, *part) for part in zip(contexts, queries, strict=True)]
    return cost_of_a_step(parts, model, how, args)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "train_step")
    parser.add_argument("--batches", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a context")
    parser.add_argument("--query", type=int, default=64, help="tokens of the query, all of them targets")
    parser.add_argument("--memory", type=int, default=8, help="memory vectors")
    parser.add_argument("--steps", type=int, nargs="*", default=[2, 1], help="write steps at the first batch size")
    parser.add_argument("--many-steps", type=int, nargs="*", default=[1, 2, 5, 10], help="at the second")
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--lora", type=int, help="train a LoRA of this rank, not all weights")
    parser.add_argument("--checkpointing", type=int, help="layers to recompute in backward passes")
    parser.add_argument("--micro-batch", type=int, help="contexts at a time; their gradients are summed")
    parser.add_argument("--warm-up", type=int, default=3, help="calls before the timed ones")
    parser.add_argument("--how", nargs="*", choices=HOW, default=HOW if torch.cuda.is_available() else HOW[:2])
    args = parser.parse_args(argv)
    if args.micro_batch and "graph" in args.how:
        parser.error("--micro-batch needs --how eager compiled")
    chosen = {"lora": args.lora, "checkpointing": args.checkpointing, "micro_batch": args.micro_batch}
    options = {name: value for name, value in chosen.items() if value}

    def record(method: str, batch: int, steps: int, function: Callable[[], common.Cost]) -> None:
        common.record(
            args, "train_step_lora" if args.lora else "train_step", method, function, memory_tokens=args.memory,
            write_steps=steps, batch=batch, length=args.length, **options,
        )  # fmt: skip

    small, large = args.batches
    for steps in args.steps:
        record("textbook", small, steps, partial(by_the_textbook, args, small, steps))
        for strategy in args.strategies:
            for how in args.how:
                if strategy != "exact" or how == "eager":  # compiled layers have no double backward
                    record(f"{strategy}, {how}", small, steps, partial(by_us, args, strategy, how, small, steps))
    for steps in args.many_steps:
        for how in dict.fromkeys((args.how[-1], args.how[0])):
            function = partial(by_us, args, "finite_difference", how, large, steps)
            record(f"finite_difference, {how}", large, steps, function)


if __name__ == "__main__":
    main()
