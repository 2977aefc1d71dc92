"""Train a writer of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from evaluation.data import Rows, qa_rows
from evaluation.train import CHECKPOINT, CURVE, LearningCurve
from gradmem_adapter.backbones import SMOLLM2, load_backbone
from gradmem_adapter.training.callbacks import StopOnSignal
from gradmem_adapter.utils.fields import claimed
from gradmem_adapter.write.batching import batches

from .writer import KINDS, prompt, question_line, token_ids

MOST_PAIRS = 8
"""The most questions on a passage in one example."""
SETTINGS = "writer.json"
"""The file with the settings of a run, in its directory."""


@dataclass(frozen=True)
class WriterRun:
    """How a writer is trained: all weights of a backbone, to continue a passage with questions and answers.

    Args:
        sources (`list[tuple[str, str]]`): kinds of texts, such as "story", and their sources with questions, see
            `qa_rows`. A source given twice counts twice.
        backbone (`str`): see `load_backbone`.
        epochs (`float`): passes over the passages.
        learning_rate (`float`): the peak learning rate, which decays to 0.
        tokens (`int`): the most tokens in a batch, including padding.
        longest (`int`): the most tokens in a passage; longer ones are left out.
        seed (`int`): seed for all random choices.
    """

    sources: list[tuple[str, str]]
    backbone: str = SMOLLM2
    epochs: float = 3.0
    learning_rate: float = 3e-4
    tokens: int = 2**14
    longest: int = 640
    seed: int = 0


class WriterBatches(Dataset[Any]):
    """Batches of passages of similar length with their questions, which are shuffled each time.

    Args:
        sources: rows with queries and targets, and the kind of their contexts.
        tokenizer: the backbone's tokenizer.
        tokens: the most tokens in a batch, including padding.
        longest: the most tokens in a passage; longer ones are left out.

    Raises:
        ValueError: no passage is left.
    """

    def __init__(
        self, sources: Sequence[tuple[str, Rows]], tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int
    ) -> None:
        self._end: list[int] = [tokenizer.eos_token_id]
        self._passages: list[tuple[list[int], list[list[int]]]] = []
        for kind, rows in sources:
            starts = token_ids(tokenizer, [prompt(kind, row["context"]) for row in rows])
            for row, start in zip(rows, starts, strict=True):
                asked = zip(row["queries"], row["targets"], strict=True)
                lines = [f"{question_line(query)} {' '.join(target.split())}\n" for query, target in asked]
                if len(start) <= longest:
                    self._passages.append((start, token_ids(tokenizer, lines)))
        if not self._passages:
            raise ValueError(f"There is no passage of at most {longest} tokens to learn from.")
        most = [sum(sorted(map(len, pairs))[-MOST_PAIRS:]) for _, pairs in self._passages]
        self._batches = batches(
            [len(start) + n + 1 for (start, _), n in zip(self._passages, most, strict=True)], tokens
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> list[dict[str, list[int]]]:
        made = []
        for start, pairs in (self._passages[i] for i in self._batches[number]):
            order = torch.randperm(len(pairs))[:MOST_PAIRS].tolist()
            written = [token for i in order for token in pairs[i]] + self._end
            made.append({"input_ids": start + written, "labels": [-100] * len(start) + written})
        return made


def train_writer(run: WriterRun, output: Path, device: torch.device) -> Path | None:
    """Train a writer, or resume an interrupted run with the same settings.

    Returns:
        The path of the writer; None if Ctrl-C or SIGTERM stopped the run, with a checkpoint to resume from.

    Raises:
        BlockingIOError: another run is using `output`.
        ValueError: `output` holds a run with other settings, or there is nothing to train on.
    """
    cpu = device.type == "cpu"
    with claimed(output / SETTINGS, asdict(run), PartialState(cpu=cpu)):
        model, tokenizer = load_backbone(run.backbone)
        setattr(model.config, KINDS, sorted({kind for kind, _ in run.sources}))
        rows = [(kind, qa_rows(source, "train")) for kind, source in run.sources]
        pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=None if cpu else 64)
        arguments = TrainingArguments(
            str(output), per_device_train_batch_size=1, num_train_epochs=run.epochs, learning_rate=run.learning_rate,
            adam_beta2=0.98, weight_decay=0.01, warmup_steps=40, use_cpu=cpu, bf16=not cpu, seed=run.seed,
            save_steps=500, save_total_limit=1, logging_steps=50, report_to="none", remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=lambda items: pad(items[0]), callbacks=[LearningCurve(output / CURVE)],
            train_dataset=WriterBatches(rows, tokenizer, run.tokens, run.longest),
        )  # fmt: skip
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
        if stop.seen:
            return None
        if trainer.is_world_process_zero():
            model.to(torch.bfloat16).save_pretrained(output / CHECKPOINT)  # type: ignore[arg-type]
            tokenizer.save_pretrained(output / CHECKPOINT)
        return output / CHECKPOINT
