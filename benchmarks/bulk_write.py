"""Texts per second written into a memory store, by one process or by several that share them.

    python -m benchmarks.bulk_write [--texts 2000] [--words 60 250] [--compile plain]
    torchrun --nproc_per_node 2 -m benchmarks.bulk_write
    accelerate launch --num_processes 2 -m benchmarks.bulk_write      (on a machine with two GPUs)

The work is that of `gradmem write rows.jsonl --store DIR`: JSON lines are read, cut, written in batches, and stored
with the index. Time is measured from when all processes are ready until the last one is done, on texts that are not
stored yet. Before that, each process writes as many other texts, so that nothing is compiled or captured during the
measurement. With random weights, each word is a token.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks import common
from benchmarks.write import COMPILE
from gradmem_adapter import GradMemPipeline, load_backbone
from gradmem_adapter.cli.bulk import write_to_store
from gradmem_adapter.cli.inputs import Inputs
from gradmem_adapter.cli.options import chosen_device
from gradmem_adapter.cli.processes import PATIENCE, meet
from gradmem_adapter.store import MemoryStore
from gradmem_adapter.write.options import WriteOptions

LR = 0.03


def write_rows(path: Path, args: argparse.Namespace, seed: int) -> None:
    """Write JSON lines of random words, the same for the same seed."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(args.texts):
            words = (f"w{draw.randrange(args.vocabulary)}" for _ in range(draw.randint(*args.words)))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; for random weights, one that knows the words."""
    if args.model != "random":
        return load_backbone(args.model)[1]
    words = ["<pad>", *(f"w{i}" for i in range(args.vocabulary))]
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>")


def measure(pipeline: GradMemPipeline, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Texts, segments and tokens per second, summed over all processes. Each process must call this."""
    options = WriteOptions(compile=COMPILE[args.compile])
    with tempfile.TemporaryDirectory() as own:
        for part in ("warm-up", "measured"):
            rows = Path(own, f"{part}.jsonl")
            write_rows(rows, args, seed=len(part))
            PartialState().wait_for_everyone()
            start = time.perf_counter()
            store, inputs = MemoryStore(folder / part), Inputs([str(rows)])
            counts = write_to_store(store, pipeline, inputs, args.segment_tokens, options=options)
            seconds = time.perf_counter() - start  # counting has synchronised all processes
            if inputs.refused or not counts["segments"] == counts["written"] == len(store):
                raise RuntimeError(f"Expected {counts}, but the store has {len(store)}; refused: {inputs.refused[:3]}.")
    return {f"{name}_per_second": counts[name] / seconds for name in ("documents", "segments", "tokens")}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "bulk_write")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--words", type=int, nargs=2, default=[60, 250], help="fewest and most words in a text")
    parser.add_argument("--segment-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", type=int, default=64, help="memory vectors")
    parser.add_argument("--compile", choices=COMPILE, default="plain")
    args = parser.parse_args(argv)
    args.device = str(chosen_device(args.device))
    args.vocabulary = common.SMOLLM2_135M["vocab_size"] - 1
    with meet(cpu=args.device == "cpu", patience=PATIENCE) as processes:
        model, _ = common.adapter(args, write_lr=LR, write_steps=args.steps, start="pooled_context")
        pipeline = GradMemPipeline(model, tokenizer(args))
        with tempfile.TemporaryDirectory() as folder:
            (shared,) = broadcast_object_list([folder])
            run = partial(measure, pipeline, Path(shared), args)
            if processes.is_main_process:
                record = common.record(
                    args, "bulk_write", args.compile, run, memory_tokens=args.memory, write_steps=args.steps,
                    processes=processes.num_processes, texts=args.texts, words=args.words,
                )  # fmt: skip
                if "error" in record.facts:
                    raise SystemExit(1)  # lets torchrun stop processes that wait for this one
            else:
                run()
            processes.wait_for_everyone()  # before the folder is deleted


if __name__ == "__main__":
    main()
