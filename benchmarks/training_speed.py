"""Training steps per second of `GradMemTrainer`: with default settings, with compiled layers, and with CUDA graphs.

    python -m benchmarks.training_speed [--works kv smollm2] [--how plain compiled,graphs]

kv: key-value retrieval, 4 layers of width 128, 8 memory vectors, in TF32 or with --bf16. smollm2: SmolLM2-135M's shape
with random weights, 8,192 context tokens per step in contexts of 224, LoRA of rank 16, 64 memory vectors, in bf16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from benchmarks import common
from evaluation.key_values import pairs_tokenizer, sample_pairs
from evaluation.models import scratch_llama
from gradmem_adapter import GradMemConfig
from gradmem_adapter.peft_model import GradMemPeftModel, get_peft_model
from gradmem_adapter.training import Batches, GradMemTrainer, GradMemTrainingArguments

HOW: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Trainer as it is", {}),
    "compiled": ("Trainer, compiled", {"torch_compile": True}),
    "graphs": ("Trainer, CUDA graphs", {"cuda_graphs": True}),
    "compiled,graphs": ("Trainer, compiled, CUDA graphs", {"torch_compile": True, "cuda_graphs": True}),
}


class Pairs(Batches):
    """Key-value pairs."""

    what = "key-value retrieval, {0.pairs} pairs, K={0.write_steps}, {0.contexts} contexts"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.bf16 = args, args.bf16

    def model(self) -> GradMemPeftModel:
        """A small model with all weights trained."""
        args = self.args
        config = GradMemConfig(
            num_memory_tokens=8, write_steps=args.write_steps, meta_gradient=args.meta_gradient, write_head=True,
            reconstruction_weight=0.25, write_clip_norm=1.0, train_backbone=True,
        )  # fmt: skip
        return get_peft_model(scratch_llama(pairs_tokenizer(), layers=args.layers or 4), config)

    def batch(self, step: int, device: torch.device) -> dict[str, Any]:
        args, generator = self.args, self.generator(step, device)
        pairs = sample_pairs(args.contexts, args.queries, args.pairs, device=device, generator=generator)
        return pairs | {"max_targets": 4}


class Texts(Batches):
    """Random tokens in contexts of 224, two queries of 48 tokens on each."""

    what = "SmolLM2-135M's shape, 8,192 tokens a step"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.bf16 = args, True

    def model(self) -> GradMemPeftModel:
        """A LoRA and memory on a frozen backbone."""
        config = GradMemConfig(
            num_memory_tokens=64, write_steps=self.args.write_steps, meta_gradient=self.args.meta_gradient,
            reconstruction_weight=0.25, write_clip_norm=1.0, lora_config=LoraConfig(r=16, target_modules="all-linear"),
        )  # fmt: skip
        return get_peft_model(common.backbone(self.args).float(), config)

    def batch(self, step: int, device: torch.device) -> dict[str, Any]:
        contexts, vocabulary = 8192 // 224, common.SMOLLM2_135M["vocab_size"]
        options: dict[str, Any] = {"device": device, "generator": self.generator(step, device)}
        context = torch.randint(4, vocabulary, (contexts, 224), **options)
        rows = torch.randint(4, vocabulary, (2 * contexts, 48), **options)
        return {
            "context_input_ids": context, "context_attention_mask": torch.ones_like(context), "input_ids": rows,
            "attention_mask": torch.ones_like(rows), "max_targets": 12,
            "labels": rows.masked_fill(torch.arange(48, device=device) < 36, -100),
            "context_index": torch.arange(contexts, device=device).repeat_interleave(2),
        }  # fmt: skip


WORKS: dict[str, type[Pairs | Texts]] = {"kv": Pairs, "smollm2": Texts}


class Clock(TrainerCallback):
    """Notes the times of logging, which waits for the GPU."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(time.perf_counter())


def measure(work: Pairs | Texts, options: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Steps per second in the second half of a training run; in the first half everything is compiled and captured."""
    cpu, clock = args.device == "cpu", Clock()
    with tempfile.TemporaryDirectory() as output, common.peak_memory(args.device) as peak:
        arguments = GradMemTrainingArguments(
            output, max_steps=2 * args.steps, logging_steps=args.steps, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=cpu, bf16=work.bf16, tf32=None if cpu else True, learning_rate=1e-4,
            lr_scheduler_type="constant", **options,
        )  # fmt: skip
        GradMemTrainer(
            work.model(), arguments, train_dataset=work, processing_class=pairs_tokenizer(), callbacks=[clock]
        ).train()
    return {"steps_per_second": args.steps / (clock.seen[1] - clock.seen[0]), **peak}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "training_speed")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--how", nargs="+", choices=HOW, default=["plain", "compiled,graphs"])
    parser.add_argument("--steps", type=int, default=200, help="timed steps, after as many that are not timed")
    parser.add_argument("--meta-gradient", default="finite_difference")
    parser.add_argument("--write-steps", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=16, help="kv: pairs in a context")
    parser.add_argument("--contexts", type=int, default=512, help="kv: contexts of a batch")
    parser.add_argument("--queries", type=int, default=8, help="kv: queries on a context")
    parser.add_argument("--bf16", action="store_true", help="kv: under autocast")
    args = parser.parse_args(argv)
    for work in (WORKS[name](args) for name in args.works):
        for method, options in (HOW[name] for name in args.how):
            common.record(
                args, "training_speed", method, partial(measure, work, options, args), write_steps=args.write_steps,
                what=work.what.format(args), bf16=work.bf16, meta_gradient=args.meta_gradient,
            )  # fmt: skip


if __name__ == "__main__":
    main()
