"""Requests answered from memory one by one, in a batch, and by an engine: requests per second, and equal answers.

    gradmem export smollm2-135m-qa exported --gguf float32
    python -m benchmarks.engines exported --engine vllm --dtype bfloat16

Run it in an environment with the engine: `make test-engines` creates such environments. The ways to answer take turns
in one process, so that other work on the machine slows all of them down.

    requests_per_second: for 32 requests on 4 states with 24 tokens each, the median of the rounds. Engines choose their
        threads themselves; llama.cpp uses half of the cores.
    same: of 50 questions on 10 texts, how many get the same 24 tokens as from Transformers in a batch, with the same
        states and dtype.
    same_float32: how many get the same tokens as from Transformers in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.service import requests
from gradmem_adapter import GradMemPipeline, MemoryState, load_checkpoint
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.peft_model import GradMemPeftModel
from gradmem_adapter.read.reader import Reader

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 0}
"""Ignore the end of an answer, so that all ways have the same work."""
TIMED, TEXTS = 32, 4
ASKED = 50


def engine(args: argparse.Namespace, model: GradMemPeftModel) -> Reader:
    """The engine's reader, to compare with Transformers."""
    if args.engine == "vllm":
        from vllm import LLM

        from gradmem_adapter.export.vllm import VLLMReader

        sizes = {"max_model_len": 512, "max_num_seqs": 64, "block_size": 32}
        return VLLMReader(model, LLM(str(args.exported), enable_prompt_embeds=True, dtype=args.dtype, **sizes))
    from llama_cpp import Llama

    from gradmem_adapter.export.llama_cpp import LlamaCppReader

    return LlamaCppReader(model, Llama(str(args.exported / "model.gguf"), n_ctx=512, verbose=False))


def prompts(pipeline: GradMemPipeline) -> tuple[list[Tensor], list[MemoryState]]:
    """Questions as tokens, and the state of each. Those on the same text share its state, and what readers cache."""
    asked = [inputs for inputs, _ in requests(ASKED)]
    texts = [inputs["context"][0].page_content for inputs in asked]
    own = list(dict.fromkeys(texts))
    states = dict(zip(own, pipeline.write_many(own, progress=False), strict=True))
    ids, mask = pipeline.encode_prompts([inputs["question"] for inputs in asked])
    return [row[counts.bool()] for row, counts in zip(ids, mask, strict=True)], [states[text] for text in texts]


def new_tokens(output: Tensor) -> Tensor:
    """The answers after the prompts."""
    return output[:, -GREEDY["max_new_tokens"] :]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "engines")
    parser.add_argument("exported", type=Path, help="the output of gradmem export for the checkpoint")
    parser.add_argument("--engine", choices=["vllm", "llama_cpp"], required=True)
    parser.add_argument("--checkpoint", default="smollm2-135m-qa")
    parser.set_defaults(repeats=2)
    args = parser.parse_args(argv)
    args.model = args.checkpoint
    exact, tokenizer = load_checkpoint(args.checkpoint, dtype=torch.float32)
    model = exact if args.dtype == "float32" else load_checkpoint(args.checkpoint, dtype=common.DTYPES[args.dtype])[0]
    ids, memory = prompts(GradMemPipeline(exact, tokenizer))
    reader = engine(args, model)

    def batched(rows: list[int], by: Any = model) -> Tensor:
        batch, mask = pad([ids[row] for row in rows], "left")
        states = MemoryState.stack([memory[row] for row in rows])
        return new_tokens(by.generate(input_ids=batch, attention_mask=mask, memory=states, strict=False, **GREEDY))

    def one_by_one(rows: list[int]) -> Tensor:
        found = []
        for row in rows:
            prompt, mask = pad([ids[row]], "left")  # a mask of ones: otherwise end tokens in a prompt count as padding
            output = model.generate(prompt, attention_mask=mask, memory=memory[row], strict=False, **GREEDY)
            found.append(new_tokens(output))
        return torch.cat(found)

    ways: dict[str, Callable[[list[int]], Tensor]] = {
        "one by one": one_by_one, "batched": batched, args.engine: lambda rows: batched(rows, reader),
    }  # fmt: skip
    everything = list(range(ASKED))
    timed = ([row for row in everything if row % 10 < TEXTS] * 2)[:TIMED]  # the texts take turns
    found = {name: way(everything) for name, way in ways.items()}  # and all is warm
    expected = {"same": found["batched"], "same_float32": batched(everything, exact)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(timed)
            seconds[name].append(time.perf_counter() - start)
    for name in ways:
        metrics = {"requests_per_second": TIMED / statistics.median(seconds[name])}
        for key, right in expected.items():
            metrics[key] = int((found[name] == right).all(dim=1).sum())
        common.record(
            args, "engines", name, partial(dict, metrics), engine=args.engine, requests=TIMED, states=TEXTS, asked=ASKED
        )


if __name__ == "__main__":  # vLLM starts processes, which import this file again
    main()
