"""Training steps per second: `GradMemTrainer`, as it is and with compiled layers and CUDA graphs, and an older loop.

    python -m benchmarks.training_speed [--old CHECKOUT] [--works kv smollm2] [--toy] [--output FILE.jsonl]

kv: key-value retrieval with 16 pairs, 512 contexts and 8 queries on each, in float32 (TF32), 4 layers of width 128, 8
memory vectors. smollm2: SmolLM2-135M's shape with random weights, 8,192 context tokens a step in contexts of 224, LoRA
of rank 16, 64 memory vectors, in bf16. Both by one write step, a finite difference and AdamW. Each measurement is a
process of its own. The older loop comes from a checkout of this repository that still has `training/graphed_run.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from evaluation.key_values import pairs_tokenizer, sample_pairs
from gradmem_adapter import GradMemConfig

ROOT = Path(__file__).parent.parent
LOOPS = {"trainer": "Trainer, compiled, CUDA graphs", "plain": "Trainer as it is", "old": "the loop before it"}
WHAT = {
    "kv": "key-value retrieval, 16 pairs, K=1, 512 contexts",
    "smollm2": "SmolLM2-135M's shape, 8,192 tokens a step",
}
STEPS = {"kv": (100, 400), "smollm2": (30, 120), "toy": (2, 4)}
"""Steps before the clock is started, in which everything is compiled and captured, and steps that count."""
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
KV = {
    "vocab_size": 67, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip


class Work(NamedTuple):
    """What is trained; its `name` is what the older loop shows."""

    name: str
    toy: bool

    @property
    def bf16(self) -> bool:
        """Whether it is in bf16 mixed precision."""
        return self.name == "smollm2"

    def model(self) -> PeftModel:
        """The model before training."""
        torch.manual_seed(0)
        fields: dict[str, Any] = SMOLLM2 if self.bf16 else KV
        small = {"num_hidden_layers": 1, "vocab_size": 67} if self.toy else {}
        backbone = LlamaForCausalLM(LlamaConfig(**fields | small, eos_token_id=3, bos_token_id=None))
        lora = {"lora_config": LoraConfig(r=16, target_modules="all-linear")}
        own: dict[str, Any] = lora if self.bf16 else {"train_backbone": True, "write_head": True}
        config = GradMemConfig(
            num_memory_tokens=64 if self.bf16 else 8, write_steps=1, meta_gradient="finite_difference",
            reconstruction_weight=0.25, write_clip_norm=1.0, **own,
        )  # fmt: skip
        return get_peft_model(backbone, config)

    def batch(self, device: torch.device, generator: torch.Generator | None = None) -> dict[str, Any]:
        """A batch, made on the device."""
        if not self.bf16:
            batch = sample_pairs(4 if self.toy else 512, 8, 16, device=device, generator=generator)
            return batch | {"max_targets": 4}
        contexts, vocabulary = (2, 67) if self.toy else (36, 49152)
        options: dict[str, Any] = {"device": device, "generator": generator}
        context, rows = (
            torch.randint(4, vocabulary, shape, **options) for shape in ((contexts, 224), (2 * contexts, 48))
        )
        labels = rows.masked_fill(torch.arange(48, device=device) < 36, -100)
        return {
            "context_input_ids": context, "context_attention_mask": torch.ones_like(context), "input_ids": rows,
            "attention_mask": torch.ones_like(rows), "labels": labels, "max_targets": 12,
            "context_index": torch.arange(contexts, device=device).repeat_interleave(2),
        }  # fmt: skip


def seconds_of_old_loop(work: Work, warm_up: int, steps: int, device: torch.device) -> float:
    """The time of the steps that count, by the loop of the checkout that is imported."""
    from gradmem_adapter.training.graphed_run import run_graphed, scalars

    model = work.model().to(device).eval()

    def loss(kind: Work) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind.bf16):
            output = model(**kind.batch(device), write_steps=1)
        return scalars(output, output.correct)

    plan: Any = SimpleNamespace(
        steps=warm_up + steps, minutes=None, seed=0, betas=(0.9, 0.999), weight_decay=0.0, muon_rate=None,
        write_rate_factor=1.0, max_grad_norm=1.0, compile=not work.toy, lr_at=lambda *_: 1e-4, kind_at=lambda _: work,
    )  # fmt: skip
    logs: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as output:
        run_graphed(
            model, loss, plan, Path(output), device=device, log_every=warm_up, save_seconds=1e9,
            callback=lambda now: logs.__setitem__(now.step, now.seconds),
        )  # fmt: skip
    return logs[warm_up + steps] - logs[warm_up]


def seconds_of_trainer(work: Work, warm_up: int, steps: int, device: torch.device, fast: bool) -> float:
    """The time of the steps that count, by `GradMemTrainer`."""
    from gradmem_adapter.training import Batches, GradMemTrainer, GradMemTrainingArguments

    class Drawn(Batches):
        def batch(self, step: int, device: torch.device) -> dict[str, Any]:
            return work.batch(device, self.generator(step, device))

    class Clock(TrainerCallback):
        seen: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # the GPU has been waited for
            self.seen.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        arguments = GradMemTrainingArguments(
            output, max_steps=warm_up + steps, logging_steps=warm_up, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=device.type == "cpu", bf16=work.bf16, learning_rate=1e-4,
            lr_scheduler_type="constant", tf32=True if device.type == "cuda" else None, cuda_graphs=fast,
            torch_compile=fast and not work.toy,
        )  # fmt: skip
        tokenizer = pairs_tokenizer()
        GradMemTrainer(
            work.model(), arguments, train_dataset=Drawn(), processing_class=tokenizer, callbacks=[Clock()]
        ).train()
    return Clock.seen[steps // warm_up] - Clock.seen[0]


def measure(work: Work, loop: str) -> dict[str, Any]:
    """One line of the result."""
    device = torch.device("cuda" if torch.cuda.is_available() and not work.toy else "cpu")
    warm_up, steps = STEPS["toy" if work.toy else work.name]
    if loop == "old":
        seconds = seconds_of_old_loop(work, warm_up, steps, device)
    else:
        seconds = seconds_of_trainer(work, warm_up, steps, device, fast=loop == "trainer")
    cuda = device.type == "cuda"
    hardware, date = torch.cuda.get_device_name() if cuda else "CPU", datetime.now(timezone.utc).date().isoformat()
    peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    return {
        "task": "training_speed", "method": LOOPS[loop], "write_steps": 1,
        "settings": {"what": WHAT[work.name], "hardware": hardware, "date": date},
        "metrics": {"steps_per_second": steps / seconds} | peak, "facts": {"torch": torch.__version__},
    }  # fmt: skip


def main() -> None:
    """Measure, each in a process of its own, and show a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout with the older loop")
    parser.add_argument("--works", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--toy", action="store_true", help="a few small steps on the CPU, to try it out")
    parser.add_argument("--output", type=Path, help="a file of records that lines are added to")
    parser.add_argument("--one", nargs=2, metavar=("WORK", "LOOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Work(args.one[0], args.toy), args.one[1])))
        return
    for work in args.works:
        for loop in LOOPS if args.old else list(LOOPS)[:-1]:
            path = [str(args.old)] if loop == "old" else []
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
            command = [sys.executable, __file__, "--one", work, loop, *["--toy"] * args.toy]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            line = done.stdout.strip().splitlines()[-1]
            print(f"{WHAT[work]}; {LOOPS[loop]}: {json.loads(line)['metrics']}", flush=True)
            if args.output is not None:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
