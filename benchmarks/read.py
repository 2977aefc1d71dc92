"""Answering from memory: time to first token and tokens per second of `generate`.

    python -m benchmarks.read [--queries 16 64 256] [--batches 1 8 64]

Each prompt has its own memory state. Compares the prompt alone ("plain") with memory whose prefix is computed in each
call ("memory") or kept from an earlier call ("kept prefix"). Time to first token is the time of `generate` with one new
token, and tokens per second count the new tokens of a whole call with `--new-tokens`.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from benchmarks import common
from gradmem_adapter.peft_model import GradMemPeftModel

WAYS = ("plain", "memory", "kept prefix")


def measure(
    model: GradMemPeftModel, backbone: PreTrainedModel, way: str, length: int, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The cost of one way of answering: `batch` prompts of `length` tokens, one memory state each."""
    query = common.random_tokens(backbone, batch, length)
    options: dict[str, Any] = {"do_sample": False}
    if way != "plain":
        options["memory"] = model.write(query[:, :1], steps=0)  # the content does not affect the cost
    model.prefix_cache.max_bytes = args.kept_mib * 2**20 if way == "kept prefix" else 0

    def cost(new: int) -> common.Cost:
        return common.measure(
            lambda: model.generate(query, max_new_tokens=new, **options), args.device, repeats=args.repeats
        )

    first, whole = cost(1), cost(args.new_tokens)
    return {
        "first_token_ms": first.milliseconds,
        "tokens_per_second": 1000 * batch * args.new_tokens / whole.milliseconds,
        "peak_gib": whole.peak_gib,
        "kept_mib": model.prefix_cache.nbytes / 2**20,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "read")
    parser.add_argument("--memory", type=int, default=16, help="memory vectors")
    parser.add_argument("--queries", type=int, nargs="+", default=[16, 64, 256], help="tokens of a prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="prompts per call")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--kept-mib", type=int, default=64, help="the most MiB of kept prefixes")
    args = parser.parse_args(argv)
    model, backbone = common.adapter(args)
    backbone.generation_config.eos_token_id = None  # never stop early
    for length, batch, way in itertools.product(args.queries, args.batches, WAYS):
        common.record(
            args, "read", way, partial(measure, model, backbone, way, length, batch, args),
            memory_tokens=args.memory, query_tokens=length, batch=batch, new_tokens=args.new_tokens,
        )  # fmt: skip


if __name__ == "__main__":
    main()
