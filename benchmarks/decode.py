"""Decoding from memory: with a growing cache, the default, and with a static one.

    python -m benchmarks.decode [--shape smollm2-1.7b] [--batch 64] [--tokens 64] [--memory 64]

Each prompt has its own memory state, or all share one with `--one-state`; prefixes are kept from an earlier call. With
a static cache (`cache_implementation="static"`), steps are launched kernel by kernel ("static, step by step"), as one
CUDA graph that each call captures ("static"), or after Transformers has compiled the model ("static, compiled", which
takes a minute at first). On a CPU the first two are the same, and nothing is compiled.

The metrics are those of a whole call of `generate` that makes all its tokens: milliseconds, milliseconds of the first
call, peak memory beyond the model, milliseconds per token (of all sequences together) without the time to the first
one, and how well the tokens agree with those of "static, step by step": `same_tokens`, the share that is equal, and
`same_until`, the number of tokens before the first difference in any sequence. Different kernels round differently,
random weights have many nearly equal logits, and after a first difference all later tokens differ. For "static, step by
step" itself, two equal calls are compared: no other way can agree better.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from torch import Tensor
from transformers import CompileConfig

from benchmarks import common
from gradmem_adapter.peft_model import GradMemPeftModel

REFERENCE = "static, step by step"
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    REFERENCE: {"cache_implementation": "static", "disable_compile": True},
    "static": {"cache_implementation": "static"},
    "static, compiled": {"cache_implementation": "static", "compile_config": CompileConfig()},
}


def measure(model: GradMemPeftModel, prompts: Tensor, way: str, args: argparse.Namespace) -> dict[str, float]:
    """The cost of one way of decoding, and whether it gives the expected tokens."""
    state = model.write(prompts[:1, :1] if args.one_state else prompts[:, :1], steps=0)  # content does not matter

    def generate(new: int, **options: Any) -> Tensor:
        found: Tensor = model.generate(prompts, memory=state, max_new_tokens=new, do_sample=False, **options)
        return found

    first = common.measure(lambda: generate(1, **WAYS[way]), args.device, args.repeats)
    whole = common.measure(lambda: generate(args.tokens, **WAYS[way]), args.device, args.repeats)
    same = (generate(args.tokens, **WAYS[way]) == generate(args.tokens, **WAYS[REFERENCE]))[:, prompts.shape[1] :]
    return vars(whole) | {
        "token_ms": (whole.milliseconds - first.milliseconds) / max(1, args.tokens - 1),
        "same_tokens": same.float().mean().item(),
        "same_until": same.all(0).cumprod(0).sum().item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "decode")
    parser.add_argument("--memory", type=int, default=64, help="memory vectors")
    parser.add_argument("--query", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="prompts per call")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--one-state", action="store_true", help="all prompts read the same memory")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["default", REFERENCE, "static"])
    args = parser.parse_args(argv)
    model, backbone = common.adapter(args)
    backbone.generation_config.eos_token_id = None  # never stop early
    model.prefix_cache.max_bytes = 2**32
    for batch in args.batch:
        prompts = common.random_tokens(backbone, batch, args.query)
        for way in args.ways:
            common.record(
                args, "decode", way, partial(measure, model, prompts, way, args), memory_tokens=args.memory,
                query_tokens=args.query, batch=batch, new_tokens=args.tokens, one_state=args.one_state,
            )  # fmt: skip


if __name__ == "__main__":
    main()
