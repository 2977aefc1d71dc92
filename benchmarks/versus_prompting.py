"""Answering from memory against prompting with the whole context.

    python -m benchmarks.versus_prompting [--lengths 256 512 1024 2048 4096 8192] [--max-batch 256] [--plot file.png]

Three ways to answer a question on a context: from its memory; with the context's KV cache kept; with the context
prefilled anew. Prefills and decoding steps are plain forward passes with Transformers' DynamicCache, which copies the
keys and values in each step. A context leaves room for question and answer in the model's positions, so the last length
is less than 8192. For batches, the KV cache of one context is repeated. `--lengths --plot file.png` draws what was
measured before.

Columns of "answer" rows, one per context length, batch size 1:
    state_bytes, memory_kv_bytes, context_kv_bytes: per context, of the state's file, of the keys and values of memory
        and control vectors, of those of the context.
    write_ms, prefill_ms: WRITE with all its steps; the context's forward pass.
    first_token_*_ms: from question to first new token, from memory (its keys and values computed anew, or kept), with
        the context's KV cache kept, with the context prefilled anew.
    *_per_gib: contexts that fit.
    break_even_prefill: questions after which writing has paid for itself against prefilling anew.
    break_even_kept: the same against a kept KV cache, which costs the prefill once: what memory saves there is bytes.

Columns of "decode" rows, one per context length and batch size, up to the one for which there is no memory:
    tokens_per_second: of all answers together. Those from memory do not depend on the context's length.
    peak_gib: the KV caches, and what decoding takes beyond them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks import common
from gradmem_adapter import GradMemConfig

ANSWER_COLUMNS = (
    "context_tokens", "state_bytes", "memory_kv_bytes", "context_kv_bytes", "states_per_gib", "memory_kv_per_gib",
    "context_kv_per_gib", "write_ms", "prefill_ms", "first_token_memory_ms", "first_token_memory_kept_ms",
    "first_token_kept_ms", "first_token_prefill_ms", "break_even_prefill", "break_even_kept", "error",
)  # fmt: skip
DECODE_COLUMNS = ("way", "context_tokens", "batch", "tokens_per_second", "peak_gib", "error")


def random_tokens(backbone: PreTrainedModel, length: int) -> Tensor:
    """Token ids [1, length]."""
    return torch.randint(backbone.config.vocab_size, (1, length), device=backbone.device)


@torch.no_grad()
def prefill(backbone: PreTrainedModel, inputs: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, Any]:
    """The token [B, 1] after ids [B, N] or embeddings [B, N, d] behind what is in the cache, and the longer cache."""
    name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
    output = backbone(**{name: inputs}, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits.argmax(-1), output.past_key_values


def reopened(cache: DynamicCache) -> DynamicCache:
    """A cache with the same tensors, which may grow while the first one stays as it is."""
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    return result


def kv_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def break_even(once_ms: float, saved_ms: float) -> float:
    """Questions until savings of `saved_ms` each have paid `once_ms`; infinite: never."""
    if saved_ms <= 0:
        return float("inf")
    return max(0.0, once_ms) / saved_ms


def questions(count: float) -> str:
    """A number of questions as the table has it."""
    return "never" if count == float("inf") else f"{count:.3g}"


def answer(model: PeftModel, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes, times and break-even of one context of `length` tokens."""
    backbone = model.get_base_model()
    context, question = random_tokens(backbone, length), random_tokens(backbone, args.question)
    state = model.write(context, steps=0)
    embed = backbone.get_input_embeddings()
    kept, memory_kept = prefill(backbone, context)[1], prefill(backbone, model.prefix_embeddings(state).detach())[1]

    def ms(function: Any) -> float:
        return common.measure(function, args.device, repeats=args.repeats).milliseconds

    def from_memory() -> None:
        prefix = model.prefix_embeddings(state).detach()
        prefill(backbone, torch.cat([prefix, embed(question)], dim=1))

    write = ms(lambda: model.write(context, steps=args.write_steps))
    once = ms(lambda: prefill(backbone, context))
    memory = ms(from_memory)
    with_memory_kept = ms(lambda: prefill(backbone, question, reopened(memory_kept)))
    with_kept = ms(lambda: prefill(backbone, question, reopened(kept)))
    anew = ms(lambda: prefill(backbone, torch.cat([context, question], dim=1)))
    state_bytes = len(state[0].to_bytes())
    return {
        "context_tokens": length,
        "state_bytes": state_bytes,
        "memory_kv_bytes": kv_bytes(memory_kept),
        "context_kv_bytes": kv_bytes(kept),
        "states_per_gib": 2**30 // state_bytes,
        "memory_kv_per_gib": 2**30 // kv_bytes(memory_kept),
        "context_kv_per_gib": 2**30 // kv_bytes(kept),
        "write_ms": write,
        "prefill_ms": once,
        "first_token_memory_ms": memory,
        "first_token_memory_kept_ms": with_memory_kept,
        "first_token_kept_ms": with_kept,
        "first_token_prefill_ms": anew,
        "break_even_prefill": questions(break_even(write, anew - memory)),
        "break_even_kept": f"time: {questions(break_even(write - once, with_kept - memory))}; bytes: at once, "
        f"{kv_bytes(kept) / state_bytes:.3g} times fewer",
    }


def decode(backbone: PreTrainedModel, cache: DynamicCache, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of `batch` answers behind the repeated cache of one context."""
    repeated = reopened(cache)
    repeated.batch_repeat_interleave(batch)
    first = random_tokens(backbone, 1).expand(batch, -1)

    def steps() -> None:
        token, growing = first, reopened(repeated)
        for _ in range(args.new_tokens):
            token, growing = prefill(backbone, token, growing)

    cost = common.measure(steps, args.device, repeats=args.repeats, warm_up=1)
    return {
        "tokens_per_second": 1000 * batch * args.new_tokens / cost.milliseconds,
        "peak_gib": kv_bytes(repeated) / 2**30 + cost.peak_gib,
    }


def decodes(model: PeftModel, way: str, length: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each batch size, doubled until there is no memory left."""
    backbone = model.get_base_model()
    context, question = random_tokens(backbone, length), random_tokens(backbone, args.question)
    inputs = context if way == "prompt" else model.prefix_embeddings(model.write(context[:, :1], steps=0)).detach()
    cache = prefill(backbone, question, prefill(backbone, inputs)[1])[1]
    batch = 1
    while batch <= args.max_batch:
        row = common.attempt(lambda batch=batch: decode(backbone, cache, batch, args))
        yield {"kind": "decode", "way": way, "context_tokens": length, "batch": batch} | row
        if "error" in row:
            return
        batch *= 2


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw bytes per context and time to first token against context length, from "answer" rows of one machine."""
    from matplotlib.figure import Figure  # the measuring itself does not need it

    rows = sorted(rows, key=lambda row: int(row["context_tokens"]))
    lengths = [int(row["context_tokens"]) for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bytes_kept = {"memory state": "state_bytes", "KV cache of the context": "context_kv_bytes"}
    first_token = {
        "from memory": "first_token_memory_ms",
        "KV cache kept": "first_token_kept_ms",
        "context prefilled anew": "first_token_prefill_ms",
    }
    for axes, label, scale, lines in (
        (left, "bytes per context", "log", bytes_kept),
        (right, "milliseconds to first token", "linear", first_token),
    ):
        for name, column in lines.items():
            axes.plot(lengths, [float(row[column]) for row in rows], marker="o", label=name)
        axes.set(xscale="log", yscale=scale, xlabel="context tokens", ylabel=label)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle(f"{rows[0]['model']} model, {rows[0]['dtype']}, {rows[0]['hardware']}")
    figure.savefig(path, dpi=150)


def latest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last "answer" row of each context length, of those on the machine and model of the very last."""
    rows = [row for row in rows if row.get("kind") == "answer" and not row.get("error")]
    same = ("hardware", "model", "layers", "dtype", "memory_tokens", "write_steps")
    chosen = [row for row in rows if all(row[name] == rows[-1][name] for name in same)]
    return list({row["context_tokens"]: row for row in chosen}.values())


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "versus_prompting")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--memory", type=int, default=16, help="memory vectors")
    parser.add_argument("--write-steps", type=int, default=5)
    parser.add_argument("--question", type=int, default=16, help="tokens of a question")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--max-batch", type=int, default=256, help="answers at a time, at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="a picture to draw from the CSV file; needs matplotlib")
    args = parser.parse_args(argv)
    if args.lengths:
        measure(args)
    if args.plot:
        plot(latest(common.read(args.output)), args.plot)


def measure(args: argparse.Namespace) -> None:
    """Measure at all lengths; rows go to the CSV file as they come."""
    backbone = common.backbone(args)
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=args.memory)).eval()
    reserved = max(args.question + args.new_tokens, model.prefix_length)
    lengths = common.fitting(args.lengths, backbone.config.max_position_embeddings - reserved)
    shape = common.environment(args.device) | {
        "model": args.model, "layers": backbone.config.num_hidden_layers, "dtype": args.dtype,
        "memory_tokens": args.memory, "write_steps": args.write_steps, "question_tokens": args.question,
    }  # fmt: skip
    answers, decoded = [], []
    for length in lengths:
        row = {"kind": "answer", "context_tokens": length}
        answers.append(row | common.attempt(lambda length=length: answer(model, length, args)))
        common.append(args.output, [shape | answers[-1]])
    common.show(answers, ANSWER_COLUMNS)
    print()
    for way, length in (("memory", lengths[0]), *(("prompt", length) for length in lengths)):
        for row in decodes(model, way, length, args):
            decoded.append(row)
            common.append(args.output, [shape | row])
    common.show(decoded, DECODE_COLUMNS)


if __name__ == "__main__":
    main()
