"""What WRITE costs: ours by every way, beside a textbook implementation in the same process.

python -m benchmarks.write [--batch 8] [--lengths 1024] [--steps 1 2 5 10]
python -m benchmarks.write many       100 contexts of 200 to 1,000 tokens, first call included
python -m benchmarks.write growth     time and memory against K and against tokens, and their plot
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter import GradMemConfig, MemoryState

from . import common, textbook

COLUMNS = ("method", "batch", "length", "write_steps", "milliseconds", "first_milliseconds", "peak_gib", "tflops",
           "share_of_matmul", "error")  # fmt: skip
METHODS = ("textbook", "textbook, no graph", "plain", "compiled, no last loss", "compiled")
WITH_LAST_LOSS = ("plain", "compiled")
WAYS = ("one by one, plain", "one by one, auto", "write_many, plain", "write_many, auto", "write_many, compiled")
COMPILE: dict[str, Any] = {"plain": False, "auto": "auto", "compiled": True}


def tokens(args: argparse.Namespace, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(args.vocabulary, (batch, length), generator=generator).to(args.device)


def adapter(args: argparse.Namespace, backbone: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=args.memory, write_lr=0.03)
    return get_peft_model(backbone, config).eval()


def writing(method: str, args: argparse.Namespace, context: Tensor, steps: int) -> Callable[[], Any]:
    """A function that writes once."""
    if method.startswith("textbook"):
        backbone = common.backbone(args, attention="eager")
        slots = 0.02 * torch.randn(args.memory, backbone.config.hidden_size, device=args.device)
        return partial(
            textbook.write,
            backbone,
            slots,
            context,
            steps,
            0.03,
            second_order_steps=None if method == "textbook" else 0,
        )
    model = adapter(args, common.backbone(args))
    compile = method.startswith("compiled")
    return lambda: model.write(context, steps=steps, compile=compile, last_loss=method in WITH_LAST_LOSS)


def cost(args: argparse.Namespace, method: str, batch: int, length: int, steps: int) -> dict[str, Any]:
    """One row."""
    function = writing(method, args, tokens(args, batch, length), steps)
    places = batch * (length + args.memory)
    flops = common.write_flops(common.backbone(args), places, length, steps, last_loss=method in WITH_LAST_LOSS)
    measured = common.measure(function, args.device, args.repeats)
    rate = flops / measured.milliseconds / 1e9
    return vars(measured) | {"tflops": rate, "share_of_matmul": rate / args.matmul}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method at every size, and how far apart the states are."""
    rows = []
    for length in args.lengths:
        for steps in args.steps:
            for method in args.methods:
                shape = {"method": method, "batch": args.batch, "length": length, "write_steps": steps}
                rows.append(shape | common.attempt(partial(cost, args, method, args.batch, length, steps)))
    return rows


def agreement(args: argparse.Namespace) -> None:
    """How far states of the fast path are from plain ones, beside how far WRITE itself carries a rounding error."""
    model, context = adapter(args, common.backbone(args)), tokens(args, 2, args.lengths[0])
    start = model.write(context, steps=0)
    rounding = torch.finfo(common.DTYPES[args.dtype]).eps
    noise = 1 + rounding * torch.randn_like(start.vectors)
    moved = MemoryState(start.vectors * noise, start.context_tokens, start.write_losses, start.fingerprint)
    plain, fast, other = (
        model.write(context, steps=args.steps[0], initial=initial, compile=compile).vectors
        for initial, compile in ((start, False), (start, True), (moved, False))
    )
    print(f"\nStates after K={args.steps[0]}, {args.dtype}: compiled against plain, relative difference "
          f"{((fast - plain).norm() / plain.norm()).item():.2e}; plain from slots with noise of {rounding:.1e}, "
          f"{((other - plain).norm() / plain.norm()).item():.2e}")  # fmt: skip


def write_all(model: Any, contexts: list[Tensor], steps: int, way: str) -> None:
    """By one of WAYS."""
    calls, how = way.split(", ")
    if calls == "write_many":
        model.write_many(contexts, steps=steps, compile=COMPILE[how])
        return
    for context in contexts:
        model.write(context[None], steps=steps, compile=COMPILE[how])


def many(args: argparse.Namespace) -> list[dict[str, Any]]:
    """100 contexts of 200 to 1,000 tokens: one by one as they come, and all at once. First calls included."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(200, 1001, (args.contexts,), generator=generator).tolist()
    contexts = [torch.randint(args.vocabulary, (size,), generator=generator) for size in sizes]
    steps, rows = args.steps[-1], []
    for method in args.ways:
        torch.compiler.reset()
        model = adapter(args, common.backbone(args))
        model.write(contexts[0][None, :8], steps=1, compile=False)  # CUDA's own start is nobody's
        common.synchronize(args.device)
        with common.peak_memory(args.device) as peak:
            start = time.perf_counter()
            write_all(model, contexts, steps, method)
            common.synchronize(args.device)
        row = {"method": method, "batch": args.contexts, "length": "200-1000", "write_steps": steps}
        rows.append(row | {"milliseconds": 1000 * (time.perf_counter() - start), "peak_gib": peak["gib"]})
    return rows


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One length after another, the longest as long as the model and the memory allow; and one K after another."""
    lengths = common.fitting(args.lengths, common.backbone(args).config.max_position_embeddings - args.memory)
    shapes = [(length, args.steps[0]) for length in lengths] + [(lengths[0], steps) for steps in args.steps[1:]]
    method = args.methods[-1]
    return [
        {"method": method, "batch": args.batch, "length": length, "write_steps": steps}
        | common.attempt(partial(cost, args, method, args.batch, length, steps))
        for length, steps in shapes
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against write steps and against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if not row.get("error")]
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 6), sharex="col", layout="constrained")
    first = good[0]
    for column, (name, other) in enumerate((("write_steps", "length"), ("length", "write_steps"))):
        line = sorted((r for r in good if r[other] == first[other]), key=lambda row: float(row[name]))
        for axis, value in zip(axes[:, column], ("milliseconds", "peak_gib"), strict=True):
            axis.plot([float(row[name]) for row in line], [float(row[value]) for row in line], marker="o")
            axis.set_ylim(bottom=0)
            axis.set_ylabel(value)
        axes[1, column].set_xlabel(name)
    figure.suptitle(f"WRITE of {first['batch']} contexts, {first['method']}, {first['hardware']}")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "write")
    parser.add_argument("what", nargs="?", choices=("compare", "many", "growth"), default="compare")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--memory", type=int, default=8, help="memory vectors")
    parser.add_argument("--vocabulary", type=int, default=49152, help="token ids are drawn below it")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="with 'many'")
    parser.add_argument("--contexts", type=int, default=100, help="with 'many'")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="with 'growth': a PNG file")
    args = parser.parse_args(argv)
    args.matmul = common.matmul_tflops(args.device, common.DTYPES[args.dtype])
    print(f"{args.device}, {args.dtype}, large matrix product: {args.matmul:.4g} TFLOP/s\n")
    environment = common.environment(args.device) | {"dtype": args.dtype, "matmul_tflops": args.matmul}
    rows = [row | environment for row in {"compare": compare, "many": many, "growth": growth}[args.what](args)]
    common.show(rows, COLUMNS)
    common.append(args.output.with_stem(f"write_{args.what}"), rows)
    if args.what == "compare" and "compiled" in args.methods:
        agreement(args)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
