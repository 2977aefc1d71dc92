"""WRITE of large models within memory budgets, on one GPU.

    python -m benchmarks.sizes --shape llama-3.1-8b --writes 1x8192 1x8192:4 1x32768:8 --shapes 10 --process-gib 24

"write_sizes" has one record for each of `--writes`: contexts x tokens and, after a colon, the GiB that they may take in
addition to the model (`max_memory`). Without a colon, only the GPU limits memory. Layers are compiled beforehand. The
metrics are those of one call after the first: time, memory beyond the weights, the share of the rate of a large matrix
product, and the plan: contexts at a time, layers that are recomputed, whether their inputs are kept on the CPU, the
predicted memory, and whether it was exceeded, so that a more frugal plan was used.

"write_sizes_held" is the memory beyond the weights that the process still holds after writing `--shapes` shapes twice.
"write_sizes_process" is a write and an answer with a limit on the memory of the whole process.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.write import flops
from gradmem_adapter import WriteOptions
from gradmem_adapter.peft_model import GradMemPeftModel
from gradmem_adapter.write.budget import Budget

UNBOUNDED = 2**50
GIB = 2**30


class Write(NamedTuple):
    """A batch of contexts, and the GiB that writing it may take."""

    batch: int
    length: int
    gib: float | None = None

    @classmethod
    def parse(cls, text: str) -> Write:
        shape, _, gib = text.partition(":")
        batch, length = shape.split("x")
        return cls(int(batch), int(length), float(gib) if gib else None)


def cost(
    args: argparse.Namespace, model: GradMemPeftModel, backbone: PreTrainedModel, asked: Write, matmul: float
) -> dict[str, float]:
    """Time and memory of a write, and how it was planned."""
    batch, length, gib = asked
    allowed = UNBOUNDED if gib is None else int(gib * GIB)
    options = WriteOptions(steps=args.steps, compile=args.compile, last_loss=False, max_memory=allowed)
    budget, context = Budget.of(backbone), common.random_tokens(backbone, batch, length)
    plan = budget.plans(batch, length, allowed, args.compile)[0]
    foretold = budget.bytes(plan, length, args.compile) / GIB
    failures = budget.failures
    found = common.measure(lambda: model.write(context, options=options), args.device, args.repeats, warm_up=1)
    rate = flops(backbone, batch * (length + args.memory), length, args.steps, last_loss=False) / found.milliseconds
    return vars(found) | {
        "share_of_matmul": rate / 1e9 / matmul, "foretold_gib": foretold, "rows": plan.rows,
        "recomputed": plan.recomputed, "offloaded": plan.offloaded, "out_of_memory": budget.failures > failures,
    }  # fmt: skip


def held(args: argparse.Namespace, model: GradMemPeftModel, backbone: PreTrainedModel) -> dict[str, float]:
    """Memory that is still held after many shapes were written."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(args.device)
    for length in range(512, 512 * (args.shapes + 1), 512):
        for _ in range(2):
            model.write(common.random_tokens(backbone, 1, length), steps=args.steps, compile=args.compile)
    torch.cuda.empty_cache()
    return {"held_gib": (torch.cuda.memory_reserved(args.device) - before) / GIB}


def within(
    args: argparse.Namespace, model: GradMemPeftModel, backbone: PreTrainedModel, length: int
) -> dict[str, float]:
    """A write and an answer, with a limit on what the process may allocate."""
    context = common.random_tokens(backbone, 1, length)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(args.device)
    total = torch.cuda.get_device_properties(args.device).total_memory
    torch.cuda.set_per_process_memory_fraction(args.process_gib * GIB / total, args.device)
    try:
        common.synchronize(args.device)
        start = time.perf_counter()
        state = model.write(context, steps=args.steps, compile=args.compile, last_loss=False)
        model.generate(context[:, :16], memory=state, max_new_tokens=16)
        common.synchronize(args.device)
        milliseconds = 1000 * (time.perf_counter() - start)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, args.device)
    return {"milliseconds": milliseconds, "process_gib": torch.cuda.max_memory_reserved(args.device) / GIB}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "sizes")
    parser.add_argument("--writes", type=Write.parse, nargs="*", default=[Write(1, 8192), Write(1, 8192, 4)])
    parser.add_argument("--shapes", type=int, default=0, help="how many shapes to write before measuring held memory")
    parser.add_argument("--process-gib", type=float, help="a limit on the memory of the process")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--memory", type=int, default=64, help="memory vectors")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    model, backbone = common.adapter(args, write_lr=0.03)
    record = partial(common.record, args, memory_tokens=args.memory, write_steps=args.steps)
    how = "compiled" if args.compile else "plain"
    matmul = common.matmul_tflops(args.device, common.DTYPES[args.dtype])
    for batch in {write.batch for write in args.writes}:  # the first pass compiles, and is compared with the plain one
        model.write(common.random_tokens(backbone, batch, 1024), steps=1, last_loss=False, compile=args.compile)
    if args.process_gib:
        length = max((write.length for write in args.writes), default=8192)
        record(
            "write_sizes_process", how, partial(within, args, model, backbone, length),
            length=length, process_limit_gib=args.process_gib,
        )  # fmt: skip
    for write in args.writes:
        record(
            "write_sizes", how, partial(cost, args, model, backbone, write, matmul),
            batch=write.batch, length=write.length, max_memory_gib=write.gib,
        )  # fmt: skip
    if args.shapes:
        record("write_sizes_held", how, partial(held, args, model, backbone), shapes=args.shapes)


if __name__ == "__main__":
    main()
