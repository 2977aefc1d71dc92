"""Answering from memory against prompting with the whole context.

    python -m benchmarks.versus_prompting [--lengths 1024 2048 4096 8192 16384 32768 65536] [--batches 1 8 64]
    python -m benchmarks.versus_prompting --shape llama-3.1-8b --write-steps 1 --compile --kvpress --process-gib 24
    python -m evaluation plots      (time to first token and bytes against context length, of all records)

Ways to answer a question on a context: from its memory; with the context's KV cache kept; with the part of that cache
that `--kvpress` keeps; with the context prefilled again. Prefills and decoding steps are plain forward passes with
Transformers' DynamicCache, which copies the keys and values in each step. A context leaves room for question and answer
in the model's positions, so the last length may be shorter than requested. For batches, the KV cache of one context is
repeated.

NVIDIA's kvpress keeps as many tokens of the cache as fit into the bytes of the state, at least one: in each layer those
whose keys have the smallest norms, the cheapest of its methods. Only its cost is measured here, not the quality of its
answers. kvpress 0.5.5 requires an older Transformers than this package, but works with the present one:
`pip install --no-deps kvpress==0.5.5 cachetools fire termcolor`. It also imports datasets: `pip install datasets`.

"answer" has one record per context length, in the order of `--lengths`, at batch size 1:
    state_bytes, memory_kv_bytes, context_kv_bytes, press_bytes: bytes per context for the state's file, the keys and
        values of memory and control vectors, those of the context, and those that kvpress keeps. states_per_gib,
        memory_kv_per_gib, context_kv_per_gib, press_per_gib: how many contexts fit into a GiB.
    write_ms, write_peak_gib, prefill_ms: WRITE with all its steps, and its memory in addition to the model; the
        context's forward pass; press_ms: the same with kvpress.
    first_token_*_ms: from question to first new token, from memory (its keys and values computed again, or kept), with
        the context's KV cache kept, with the part that kvpress keeps (press), with the context prefilled again.
    break_even_prefill: the number of questions after which writing is cheaper than prefilling again; null: never.
        Compared with a kept KV cache, which costs one prefill, memory saves bytes.

"memory" and "prompt" have one record per context length and batch size, up to the first that does not fit:
    tokens_per_second: for all answers together. From memory, it does not depend on the context's length.
    peak_gib: the KV caches, and the memory that decoding needs in addition.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks import common
from gradmem_adapter import WriteOptions
from gradmem_adapter.peft_model import GradMemPeftModel

KINDS = ("answer", "decode")


@torch.no_grad()
def prefill(
    backbone: PreTrainedModel, inputs: Tensor, cache: DynamicCache | None = None, **options: Tensor
) -> tuple[Tensor, Any]:
    """The token [B, 1] after the cache and ids [B, N] or embeddings [B, N, d], and the longer cache."""
    name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
    output = backbone(**{name: inputs}, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
    return output.logits.argmax(-1), output.past_key_values


def reopened(cache: DynamicCache) -> DynamicCache:
    """A cache with the same tensors, which may grow while the original stays unchanged."""
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    return result


def pressed(backbone: PreTrainedModel, context: Tensor, tokens: int) -> DynamicCache:
    """The context's cache, reduced by kvpress to `tokens` tokens."""
    from kvpress import KnormPress

    length = context.shape[1]
    places = torch.arange(length, device=context.device)  # no longer passed to hooks since Transformers 5.3
    with KnormPress(compression_ratio=max(0.0, 1 - (tokens + 0.5) / length))(backbone):  # rounded down to `tokens`
        return cast(DynamicCache, prefill(backbone, context, cache_position=places)[1])


def kv_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def break_even(once_ms: float, saved_ms: float) -> float | None:
    """The number of questions until savings of `saved_ms` each exceed `once_ms`; None: never."""
    return None if saved_ms <= 0 else max(0.0, once_ms) / saved_ms


def answer(model: GradMemPeftModel, backbone: PreTrainedModel, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes, times and break-even of one context of `length` tokens."""
    context, question = (common.random_tokens(backbone, 1, tokens) for tokens in (length, args.question))
    state = model.write(context, steps=0)
    embed = backbone.get_input_embeddings()
    kept, memory_kept = prefill(backbone, context)[1], prefill(backbone, model.prefix_embeddings(state).detach())[1]

    def cost(function: Callable[[], Any]) -> common.Cost:
        return common.measure(function, args.device, repeats=args.repeats, warm_up=args.warm_up)

    def ms(function: Callable[[], Any]) -> float:
        return cost(function).milliseconds

    def from_memory() -> None:
        prefix = model.prefix_embeddings(state).detach()
        prefill(backbone, torch.cat([prefix, embed(question)], dim=1))

    sizes = {"state": len(state[0].to_bytes()), "memory_kv": kv_bytes(memory_kept), "context_kv": kv_bytes(kept)}
    press = {}
    if args.kvpress:
        tokens = max(1, sizes["state"] * length // sizes["context_kv"])
        places = torch.arange(length, length + args.question, device=context.device)[None]
        few = pressed(backbone, context, tokens)
        sizes["press"] = kv_bytes(few)
        press = {
            "press_ms": ms(lambda: pressed(backbone, context, tokens)),
            "first_token_press_ms": ms(lambda: prefill(backbone, question, reopened(few), position_ids=places)),
        }
    options = WriteOptions(
        steps=args.write_steps,
        compile=args.compile or "auto",
        last_loss=args.last_loss,
        max_memory=args.max_memory or "auto",
    )
    write = cost(lambda: model.write(context, options=options))
    found = {
        **{f"{name}_bytes": size for name, size in sizes.items()},
        **{f"{name.replace('state', 'states')}_per_gib": 2**30 // size for name, size in sizes.items()},
        "write_ms": write.milliseconds,
        "write_peak_gib": write.peak_gib,
        "prefill_ms": ms(lambda: prefill(backbone, context)),
        "first_token_memory_ms": ms(from_memory),
        "first_token_memory_kept_ms": ms(lambda: prefill(backbone, question, reopened(memory_kept))),
        "first_token_kept_ms": ms(lambda: prefill(backbone, question, reopened(kept))),
        "first_token_prefill_ms": ms(lambda: prefill(backbone, torch.cat([context, question], dim=1))),
        **press,
    }
    saved = found["first_token_prefill_ms"] - found["first_token_memory_ms"]
    return found | {"break_even_prefill": break_even(found["write_ms"], saved)}


def decode(
    model: GradMemPeftModel, backbone: PreTrainedModel, way: str, length: int, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of `batch` answers after the repeated cache of one context and a question."""
    context, question = (common.random_tokens(backbone, 1, tokens) for tokens in (length, args.question))
    inputs = context if way == "prompt" else model.prefix_embeddings(model.write(context[:, :1], steps=0)).detach()
    repeated = prefill(backbone, question, prefill(backbone, inputs)[1])[1]
    repeated.batch_repeat_interleave(batch)
    first = common.random_tokens(backbone, batch, 1)

    def steps() -> None:
        token, growing = first, reopened(repeated)
        for _ in range(args.new_tokens):
            token, growing = prefill(backbone, token, growing)

    cost = common.measure(steps, args.device, repeats=args.repeats, warm_up=1)
    return {
        "tokens_per_second": 1000 * batch * args.new_tokens / cost.milliseconds,
        "peak_gib": kv_bytes(repeated) / 2**30 + cost.peak_gib,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "versus_prompting")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 17)])
    parser.add_argument("--memory", type=int, default=16, help="memory vectors")
    parser.add_argument("--write-steps", type=int, default=5)
    parser.add_argument("--question", type=int, default=16, help="tokens of a question")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--compile", action="store_true", help="compile WRITE from the first call")
    parser.add_argument("--last-loss", action=argparse.BooleanOptionalAction, default=True, help="of WRITE")
    parser.add_argument("--max-memory", type=int, help="bytes that WRITE may take in addition to the model")
    parser.add_argument("--process-gib", type=float, help="a limit on the GPU memory of the process")
    parser.add_argument("--kvpress", action="store_true", help="also compare with a cache of as many bytes by kvpress")
    parser.add_argument("--warm-up", type=int, default=2, help="calls before the timed ones")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS, help="what to measure")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 64], help="answers at a time, until one batch does not fit"
    )
    args = parser.parse_args(argv)
    if args.process_gib:
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.process_gib * 2**30 / total, args.device)
    model, backbone = common.adapter(args)
    reserved = max(args.question + args.new_tokens, model.prefix_length)
    lengths = common.fitting(args.lengths, backbone.config.max_position_embeddings - reserved)

    chosen = {
        "compile": args.compile, "last_loss": args.last_loss, "max_memory": args.max_memory,
        "process_limit_gib": args.process_gib,
        "kvpress": importlib.metadata.version("kvpress") if args.kvpress else None,
    }  # fmt: skip
    options = {name: value for name, value in chosen.items() if value != parser.get_default(name) and value is not None}

    def record(method: str, function: Any, **settings: Any) -> bool:
        found = common.record(
            args, "versus_prompting", method, function, memory_tokens=args.memory, write_steps=args.write_steps,
            question_tokens=args.question, **options, **settings,
        )  # fmt: skip
        return "error" not in found.facts

    for length in lengths if "answer" in args.kinds else ():
        record("answer", partial(answer, model, backbone, length, args), kind="answer", context_tokens=length)
    decoded = [("memory", lengths[0]), *(("prompt", length) for length in lengths)] if "decode" in args.kinds else []
    for way, length in decoded:
        for batch in args.batches:
            function = partial(decode, model, backbone, way, length, batch, args)
            if not record(way, function, kind="decode", context_tokens=length, batch=batch):
                break


if __name__ == "__main__":
    main()
