"""The evaluator: a trained model on every task, at every number of write steps and of states."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.prompts import Prompt
from gradmem_adapter.state import MemoryState
from gradmem_adapter.support import surest
from gradmem_adapter.utils.files import replacing

from .config import Evaluation, RunConfig
from .methods.base import cache_bytes
from .models import language_model, load_model
from .results import Record, add_records, device_name
from .scores import standard_error
from .tasks import Measurement, Task
from .train import CHECKPOINT

SCORED = 64
"""Questions per batch of scoring."""


@dataclass(frozen=True)
class Answerer:
    """A trained model that reads contexts at K = `steps` and answers questions on them."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    steps: int
    checkpoint: str = ""
    """Its name."""
    written: dict[str, MemoryState] = field(default_factory=dict)
    """A cache of memory states by context, so that a context is written only once."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def backbone(self) -> PreTrainedModel:
        """The language model in it."""
        return language_model(self.model)

    def answer(
        self,
        contexts: Sequence[str],
        queries: Sequence[Prompt],
        reads: Sequence[Sequence[int]],
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Greedy answers; see `Method.answer`."""
        if isinstance(self.model, PeftModel):
            memory = self.states(contexts)
            lengths = [memory.num_memory_tokens] * len(memory)
            return self.ask(memory, lengths, queries, reads, max_new_tokens)
        return self.config.method.answer(
            self.model, self.tokenizer, contexts, queries, reads,
            steps=self.steps, query_format=self.config.query_format, max_new_tokens=max_new_tokens,
        )  # fmt: skip

    @property
    def pipeline(self) -> GradMemPipeline:
        """The pipeline of a model with an adapter.

        Raises:
            TypeError: the model has no adapter.
        """
        if not isinstance(self.model, PeftModel):
            raise TypeError("alone and sequential read memory states, so they need the method gradmem.")
        return GradMemPipeline(self.model, self.tokenizer)

    def states(self, contexts: Sequence[str]) -> MemoryState:
        """The memory states of contexts."""
        if new := [context for context in dict.fromkeys(contexts) if context not in self.written]:
            ids = [list(row) for row in self.pipeline.tokenizer(new)["input_ids"]]
            states = self.config.method.read(self.model, self.tokenizer, ids, self.steps)
            self.written.update(zip(new, states, strict=True))
        return MemoryState.stack([self.written[context] for context in contexts])

    def surest(
        self, memory: MemoryState, queries: Sequence[Prompt], reads: Sequence[Sequence[int]],
        search_scores: Sequence[Sequence[float]] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """For each question, the state that most likely holds an answer, as chosen by `GradMemPipeline.select`."""
        pairs = [(query, i) for query, read in zip(queries, reads, strict=True) for i in read]
        parts = [pairs[start : start + SCORED] for start in range(0, len(pairs), SCORED)]
        found = [self.pipeline.support([q for q, _ in part], memory=memory[[i for _, i in part]]) for part in parts]
        scores = itertools.chain.from_iterable(found)
        best = [
            surest(list(itertools.islice(scores, len(read))), searched)
            for read, searched in zip(reads, search_scores or itertools.repeat(None, len(reads)), strict=True)
        ]
        return [[read[i]] for read, i in zip(reads, best, strict=True)]

    def ask(
        self, kept: Any, lengths: Sequence[int], queries: Sequence[Prompt], reads: Sequence[Sequence[int]],
        max_new_tokens: int = 32,
    ) -> list[str]:  # fmt: skip
        """Greedy answers from contexts that were already read; see `Method.ask`."""
        return self.config.method.ask(
            self.model, self.tokenizer, kept, lengths, queries, reads,
            query_format=self.config.query_format, max_new_tokens=max_new_tokens,
        )  # fmt: skip


def evaluate(
    checkpoint: Path,
    *,
    device: torch.device,
    evaluation: Evaluation | None = None,
    limit: int | None = None,
    seed: int = 0,
    results: Path | None = None,
    answers: Path | None = None,
    show: Callable[[str], None] = print,
) -> list[Record]:
    """Measure a trained model.

    Args:
        checkpoint (`Path`): a trained model.
        device (`torch.device`): the device to run on.
        evaluation (`Evaluation`, *optional*): what to measure; None: as the checkpoint's configuration says.
        limit (`int`, *optional*): the most contexts of each task; it becomes one of the settings of the records.
        seed (`int`, *optional*, defaults to `0`): seed for drawing the other contexts if several are asked.
        results (`Path`, *optional*): a file to which each record is added at once.
        answers (`Path`, *optional*): a file for every query with its answer and its scores, one JSON object per line.
            The order of queries is the same for all checkpoints, so that two can be compared in pairs.
        show (`Callable`, *optional*): called with a line after each measurement.

    Raises:
        ValueError: the model cannot be measured this way; the message says why.
    """
    model, tokenizer, config = load_model(checkpoint, device)
    evaluation = evaluation or config.evaluation
    tasks = [task for task in evaluation.tasks or config.tasks if task.measured]
    if not tasks:
        raise ValueError(f"{checkpoint} was not trained on a task that can be measured: name a task.")
    steps = evaluation.write_steps if config.method.step else (0,)  # other methods have no steps
    records: list[Record] = []
    lines: list[str] = []
    for (task, k), states in itertools.product(itertools.product(tasks, steps), evaluation.states):
        if states == evaluation.states[0]:
            answerer = Answerer(model, tokenizer, config, k, _name_of(checkpoint))
        found = task.measure(answerer, evaluation.split, states=states, limit=limit, seed=seed)
        settings = found.settings | config.method.settings | ({} if limit is None else {"limit": limit})
        found = replace(found, settings=settings)
        records.append(_record(task, answerer, found, evaluation.split, states, seed))
        if results is not None:
            add_records(results, records[-1:])
        if answers is not None:
            lines += _answer_lines(records[-1], found)
            with replacing(answers) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        show(_summary(records[-1]))
    return records


def _record(task: Task, answerer: Answerer, found: Measurement, split: str, states: int, seed: int) -> Record:
    config, values = answerer.config, {name: value.double() for name, value in found.values.items()}
    method, tokens = config.method, float(found.facts["context_tokens"])
    drawn = config.write_steps
    return Record(
        task=task.name,
        method=method.name,
        dataset=task.dataset,
        split=split,
        memory_tokens=method.memory_tokens(config.memory),
        trained_steps="" if not drawn else f"{drawn[0]}-{drawn[-1]}" if len(drawn) > 1 else str(drawn[0]),
        write_steps=answerer.steps,
        states=states,
        settings=task.settings | found.settings,
        metrics={name: value.mean().item() for name, value in values.items()},
        errors={name: standard_error(value) for name, value in values.items()},
        n=max(len(value) for value in values.values()),
        device=device_name(answerer.device),
        training_steps=config.steps,
        training_minutes=config.trained_minutes,
        seed=seed,
        facts=found.facts
        | {
            "bytes_per_context": method.bytes_per_context(answerer.backbone, config.memory, tokens),
            "full_bytes": cache_bytes(answerer.backbone, tokens),
        },
    )


def _answer_lines(record: Record, found: Measurement) -> Iterator[str]:
    what: dict[str, Any] = {
        "dataset": record.dataset, "split": record.split, "write_steps": record.write_steps, "states": record.states,
    }  # fmt: skip
    for line in found.answers:
        yield json.dumps(what | line, ensure_ascii=False) + "\n"


def _summary(record: Record) -> str:
    settings = "".join(f", {name} {value}" for name, value in record.settings.items() if value is not None)
    side = "" if record.states == 1 else f", {record.states} contexts side by side"
    means = ", ".join(f"{name} {value:.3f}" for name, value in record.metrics.items() if value is not None)
    return f"{record.dataset}{settings}, K={record.write_steps}{side}: {means} ({record.n})"


def _name_of(checkpoint: Path) -> str:
    """The name of a checkpoint's directory, with that of its run if the checkpoint's own name is generic."""
    path = checkpoint.resolve()
    if path.is_file():
        return f"{path.stem}, untrained"
    return f"{path.parent.name}/{path.name}" if path.name.startswith(CHECKPOINT) else path.name
