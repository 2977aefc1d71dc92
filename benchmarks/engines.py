"""Requests answered from memory one by one, in a batch, and by an engine: how many a second, and how many tokens alike.

    gradmem export checkpoints/smollm2-135m-qa exported
    python -m benchmarks.engines exported --engine vllm --dtype bfloat16

32 requests over 4 states of smollm2-135m-qa, 24 tokens each, greedy and to their end. Run it where the engine is
installed (`make test-engines` makes such environments). llama.cpp needs exported/model.gguf (`--gguf float32`).
Prints a line of JSON for each way of answering.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.read.reader import Reader

TEXTS = (
    "The heron lives on the island of Mull. It eats eels, and its nest is in an old oak by the harbour.",
    "The lighthouse keeper of Orm counts 14 ships each night. He drinks black tea and plays the fiddle.",
    "A tram was built in Lisbon in 1901. It is yellow, seats 20 people and climbs the hill of Graça.",
    "Anna sells bread on Tuesdays at the market of Bergen. Her brother Olaf repairs boats in winter.",
)
QUESTIONS = ("Where is it?", "What is it about?", "Who is named?", "How many are there?") * 2
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 0}


def engine(args: argparse.Namespace, pipeline: GradMemPipeline) -> Reader:
    """Who answers beside Transformers."""
    if args.engine == "vllm":
        from vllm import LLM

        from gradmem_adapter.export.vllm import VLLMReader

        sizes = {"max_model_len": 512, "max_num_seqs": 32, "block_size": 32}
        return VLLMReader(pipeline.model, LLM(str(args.exported), enable_prompt_embeds=True, dtype=args.dtype, **sizes))
    from llama_cpp import Llama

    from gradmem_adapter.export.llama_cpp import LlamaCppReader

    return LlamaCppReader(pipeline.model, Llama(str(args.exported / "model.gguf"), n_ctx=512, verbose=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path, help="what gradmem export made")
    parser.add_argument("--engine", choices=["vllm", "llama_cpp"], required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpoint", default="smollm2-135m-qa")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.checkpoint)
    pipeline = GradMemPipeline(model.to(getattr(torch, args.dtype)), tokenizer)
    states = pipeline.write(list(TEXTS))
    prompts = list(QUESTIONS) * len(TEXTS)
    memory = states[[i // len(QUESTIONS) for i in range(len(prompts))]]
    ids, mask = pipeline.encode_prompts(prompts)
    reader = engine(args, pipeline)

    def one_by_one() -> Tensor:
        rows = [
            model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], memory=memory[i], **GREEDY)
            for i in range(len(ids))
        ]
        return torch.cat(rows)

    ways: dict[str, Callable[[], Tensor]] = {
        "batched": lambda: model.generate(ids, attention_mask=mask, memory=memory, **GREEDY),
        "one by one": one_by_one,
        args.engine: lambda: reader.generate(input_ids=ids, attention_mask=mask, memory=memory, **GREEDY),
    }
    expected = None
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        found = way()
        seconds = time.perf_counter() - start
        expected = found if expected is None else expected
        alike = int((found == expected).all(dim=1).sum())
        figures = {"requests_per_second": round(len(ids) / seconds, 2), "alike": alike, "of": len(ids)}
        print(json.dumps({"way": name, "dtype": args.dtype} | figures), flush=True)


if __name__ == "__main__":  # vLLM starts processes, which import this file again
    main()
