"""The cost of WRITE in every way that the package offers, and of a textbook implementation in the same process.

python -m benchmarks.write [--batch 8] [--lengths 1024] [--steps 1 2 5]
python -m benchmarks.write many       100 contexts of 200 to 1,000 tokens, including the first call
python -m benchmarks.write growth     time and memory against tokens, and against K
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import common, textbook

METHODS = ("textbook", "textbook, no graph", "plain", "compiled, no last loss", "compiled")
WAYS = ("one by one, plain", "one by one, auto", "write_many, plain", "write_many, auto", "write_many, compiled")
LR = 0.03
COMPILE: dict[str, Any] = {"plain": False, "auto": "auto", "compiled": True}


def writing(
    method: str, args: argparse.Namespace, length: int, steps: int
) -> tuple[Callable[[], Any], PreTrainedModel]:
    """A function that writes once, and the model that it uses."""
    if method.startswith("textbook"):
        backbone = common.backbone(args, attention="eager")
        context = common.random_tokens(backbone, args.batch, length)
        slots = 0.02 * torch.randn(args.memory, backbone.config.hidden_size, device=args.device)
        kept = 0 if method == "textbook, no graph" else None
        return partial(textbook.write, backbone, slots, context, steps, LR, second_order_steps=kept), backbone
    model, backbone = common.adapter(args, write_lr=LR)
    context, compile = common.random_tokens(backbone, args.batch, length), method.startswith("compiled")
    last_loss = method != "compiled, no last loss"
    return lambda: model.write(context, steps=steps, compile=compile, last_loss=last_loss), backbone


def flops(model: PreTrainedModel, tokens: int, length: int, steps: int, last_loss: bool = True) -> float:
    """Floating-point operations of WRITE: `steps` forward and backward passes without weight gradients, and one more
    forward pass for the loss after the last step.

    A matrix product of n parameters takes 2n operations per token forward, and as many backward (only for activations).
    Causal attention over N tokens takes 2 N d per token and layer forward, and 2.5 times that backward.
    """
    config = model.config.get_text_config()
    matrices = [p.numel() for p in model.parameters() if p.dim() == 2]
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    products = sum(matrices) - table
    attention = 2 * length * config.hidden_size * config.num_hidden_layers
    forward = tokens * (2 * products + attention)
    backward = tokens * (2 * products + 2.5 * attention)
    return steps * (forward + backward) + (forward if last_loss else 0)


def cost(args: argparse.Namespace, method: str, length: int, steps: int, matmul: float) -> dict[str, Any]:
    """Time and memory of one WRITE, and its rate relative to a large matrix product."""
    function, backbone = writing(method, args, length, steps)
    found = common.measure(function, args.device, args.repeats)
    operations = flops(backbone, args.batch * (length + args.memory), length, steps, method in ("plain", "compiled"))
    rate = operations / found.milliseconds / 1e9
    return vars(found) | {"tflops": rate, "share_of_matmul": rate / matmul}


def measure_shapes(args: argparse.Namespace, shapes: list[tuple[str, int, int]]) -> None:
    """Measure methods at lengths and numbers of steps."""
    matmul = common.matmul_tflops(args.device, common.DTYPES[args.dtype])
    for method, length, steps in shapes:
        common.record(
            args, f"write_{args.what}", method, partial(cost, args, method, length, steps, matmul),
            memory_tokens=args.memory, write_steps=steps, batch=args.batch, length=length,
        )  # fmt: skip


def write_all(args: argparse.Namespace, way: str, steps: int) -> dict[str, float]:
    """Write contexts of 200 to 1,000 tokens, one by one or all at once, including first calls."""
    calls, how = way.split(", ")
    torch.compiler.reset()
    model, backbone = common.adapter(args, write_lr=LR)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(200, 1001, (args.contexts,), generator=generator).tolist()
    contexts = [common.random_tokens(backbone, 1, size)[0] for size in sizes]
    model.write(contexts[0][None, :8], steps=1, compile=False)  # start CUDA before the measurement
    common.synchronize(args.device)
    with common.peak_memory(args.device) as peak:
        start = time.perf_counter()
        if calls == "write_many":
            model.write_many(contexts, steps=steps, compile=COMPILE[how])
        else:
            for context in contexts:
                model.write(context[None], steps=steps, compile=COMPILE[how])
        common.synchronize(args.device)
        milliseconds = 1000 * (time.perf_counter() - start)
    return {"milliseconds": milliseconds, **peak}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "write")
    parser.add_argument("what", nargs="?", choices=("compare", "many", "growth"), default="compare")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--memory", type=int, default=8, help="memory vectors")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="with 'many'")
    parser.add_argument("--contexts", type=int, default=100, help="with 'many'")
    args = parser.parse_args(argv)
    if args.what == "compare":
        measure_shapes(args, [(m, n, k) for n, k, m in itertools.product(args.lengths, args.steps, args.methods)])
    elif args.what == "growth":  # all lengths at the first K, up to the model's; then the first length at the other K
        lengths = common.fitting(args.lengths, common.backbone(args).config.max_position_embeddings - args.memory)
        shapes = [(n, args.steps[0]) for n in lengths] + [(lengths[0], k) for k in args.steps[1:]]
        measure_shapes(args, [(args.methods[-1], *shape) for shape in shapes])
    else:
        steps = args.steps[-1]
        for way in args.ways:
            common.record(
                args, "write_many", way, partial(write_all, args, way, steps),
                memory_tokens=args.memory, write_steps=steps, batch=args.contexts, length="200-1000",
            )  # fmt: skip


if __name__ == "__main__":
    main()
