"""Results on questions about texts: measuring a trained model, and everything that is shown of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.training.metrics import Score

from .qa import score_qa
from .qa_batches import Rows
from .qa_training import Answerer, questions
from .records import device_name, pyplot

TASK = "answers"
NAMES = {
    "full_context": "full context",
    "gradmem": "GradMem",
    "forward_memory": "forward-only memory",
    "mean_pooling": "mean pooling",
    "truncated_text": "text cut to m tokens",
    "no_context": "no context",
}
SCORES = ("exact_match", "f1", "rouge_l")


@dataclass(frozen=True)
class QARecord:
    """One measurement: greedy answers to the questions of a data set."""

    dataset: str
    split: str
    """Of the data: "test", as a rule."""
    method: str
    memory_tokens: int
    """m; 0 where there is no memory of fixed size."""
    write_steps: int
    """K (or passes); 0 where nothing is written."""
    states: int
    """How many contexts each question was asked of, one of which has the answer."""
    exact_match: float
    exact_match_error: float
    """Standard error of the mean, as of the others."""
    f1: float
    f1_error: float
    rouge_l: float
    rouge_l_error: float
    questions: int
    context_tokens: float
    """Mean length of a context."""
    bytes_per_context: float
    """Kept for a context in float32: memory vectors, or keys and values."""
    full_bytes: float
    """Keys and values of a whole context in float32."""
    trained_steps: str
    """The write steps that training drew from, as "1-5"."""
    training_steps: int
    seed: int
    device: str

    @property
    def key(self) -> tuple[str, str, str, int, str, int, int]:
        """What a later measurement replaces."""
        method = self.method, self.memory_tokens, self.trained_steps
        return self.dataset, self.split, *method, self.write_steps, self.states

    @property
    def name(self) -> str:
        """The method with its m and K, as tables have it."""
        parts = [NAMES[self.method]]
        if self.memory_tokens:
            parts.append(f"m={self.memory_tokens}")
        if self.method in ("gradmem", "forward_memory"):
            parts.append(f"K={self.write_steps}")
        return ", ".join(parts)


def standard_error(values: Tensor) -> float:
    """Of the mean of values [n]; 0 for a single one, which says nothing of how they spread."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def distractors(index: Sequence[int], contexts: int, states: int, seed: int) -> list[list[int]]:
    """For each query the contexts it is asked of: its own in a random place among `states` - 1 others.

    Raises:
        ValueError: there are fewer contexts than states.
    """
    if states > contexts:
        raise ValueError(f"There are {contexts} contexts; a question cannot be asked of {states}.")
    draw, reads = random.Random(seed), []
    for own in index:
        others = draw.sample([i for i in range(contexts) if i != own], states - 1)
        others.insert(draw.randrange(states), own)
        reads.append(others)
    return reads


def measure(
    answerer: Answerer,
    rows: Rows,
    dataset: str,
    *,
    split: str = "test",
    states: int = 1,
    seed: int = 0,
    score: Score = score_qa,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> QARecord:
    """Answer all questions of `rows` greedily and score them.

    Args:
        split: which part of the data set the rows are, for the record.
        states: how many contexts each question is asked of, side by side.
        show: told every answer: the query, the answer, the accepted answers and the scores.
    """
    contexts, queries, index, references = questions(rows)
    reads = distractors(index, len(contexts), states, seed)
    answers = answerer.answer(contexts, queries, reads)
    scores = [score(answer, accepted) for answer, accepted in zip(answers, references, strict=True)]
    if show is not None:
        for query, answer, accepted, values in zip(queries, answers, references, scores, strict=True):
            show({"query": query, "answer": answer, "accepted": accepted, **values})
    tensors = {name: torch.tensor([s[name] for s in scores], dtype=torch.float64) for name in SCORES}
    recipe, model = answerer.recipe, answerer.model
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    config: Any = backbone.config.get_text_config()
    lengths = [len(answerer.tokenizer(text)["input_ids"]) for text in contexts]
    tokens = sum(lengths) / len(lengths)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 4 * 2 * config.num_hidden_layers * heads * head
    kept = {
        "full_context": cache * tokens,
        "no_context": 0.0,
        "truncated_text": float(cache * recipe.num_memory_tokens),
    }.get(recipe.method, 4.0 * recipe.num_memory_tokens * config.hidden_size)
    writes = recipe.method in ("gradmem", "forward_memory")
    drawn = sorted(set(recipe.write_steps))
    return QARecord(
        dataset=dataset,
        split=split,
        method=recipe.method,
        memory_tokens=recipe.num_memory_tokens,
        write_steps=answerer.steps if writes else 0,
        states=states,
        **{name: value.mean().item() for name, value in tensors.items()},
        **{f"{name}_error": standard_error(value) for name, value in tensors.items()},
        questions=len(queries),
        context_tokens=tokens,
        bytes_per_context=kept,
        full_bytes=cache * tokens,
        trained_steps=(f"{drawn[0]}-{drawn[-1]}" if len(drawn) > 1 else str(drawn[0])) if writes else "",
        training_steps=recipe.steps,
        seed=seed,
        device=device_name(answerer.device),
    )


def tables(records: Iterable[QARecord]) -> list[Table]:
    """One table per data set: methods with their m and K, scores in % with standard errors, bytes and compression."""
    found = sorted(records, key=lambda r: (r.dataset, r.split, r.states, list(NAMES).index(r.method), r.key))
    result = []
    for dataset, split, states in dict.fromkeys((r.dataset, r.split, r.states) for r in found):
        side = "" if states == 1 else f", each question asked of {states} contexts side by side"
        table = Table(title=f"{dataset}, {split}{side}")
        table.add_column("", no_wrap=True)
        table.add_column("trained with")
        for heading in ("exact match %", "F1 %", "ROUGE-L %", "bytes/context", "compression"):
            table.add_column(heading)
        for r in (r for r in found if (r.dataset, r.split, r.states) == (dataset, split, states)):
            shown = [f"{100 * getattr(r, name):.1f} ± {100 * getattr(r, name + '_error'):.1f}" for name in SCORES]
            ratio = f"{r.full_bytes / r.bytes_per_context:.0f} x" if r.bytes_per_context else ""
            trained = f"K={r.trained_steps}" if r.trained_steps else ""
            table.add_row(r.name, trained, *shown, f"{r.bytes_per_context:,.0f}", ratio)
        result.append(table)
    return result


def _varies(record: QARecord, name: str) -> bool:
    """Whether its method has a number of write steps (0 is one), or of memory vectors."""
    return record.method in ("gradmem", "forward_memory") if name == "write_steps" else record.memory_tokens > 0


def plot(records: Sequence[QARecord], output: Path) -> list[Path]:
    """Draw F1 against m and against K for each data set.

    Returns:
        The files made in the directory `output`.
    """
    plt = pyplot()
    output.mkdir(parents=True, exist_ok=True)
    files = []
    alone = [r for r in records if r.states == 1 and r.split == "test"]
    for dataset in dict.fromkeys(r.dataset for r in alone):
        mine = [r for r in alone if r.dataset == dataset]
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        names = {"memory_tokens": "m", "write_steps": "K"}
        for panel, name, other in zip(panels, names, reversed(names), strict=True):
            for r in (r for r in mine if not _varies(r, name)):
                panel.axhline(100 * r.f1, linestyle=":", color="gray")
                panel.annotate(NAMES[r.method], (1, 100 * r.f1), xycoords=("axes fraction", "data"), ha="right")
            varied = [r for r in mine if _varies(r, name)]
            # A line joins what was trained alike.
            for kind in dict.fromkeys((r.method, getattr(r, other), r.trained_steps) for r in varied):
                line = sorted(
                    (r for r in varied if (r.method, getattr(r, other), r.trained_steps) == kind),
                    key=lambda r: getattr(r, name),
                )
                method, fixed, trained = kind
                label = NAMES[method] + (f", {names[other]}={fixed}" if _varies(line[0], other) else "")
                label += f", trained with K={trained}" if trained else ""
                panel.errorbar(
                    [getattr(r, name) for r in line], [100 * r.f1 for r in line], [100 * r.f1_error for r in line],
                    marker="o", label=label,
                )  # fmt: skip
            panel.set(xlabel={"memory_tokens": "memory vectors m", "write_steps": "write steps K"}[name])
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
            if varied:
                panel.legend(fontsize="small")
        panels[0].set(ylabel="token F1 %", title=dataset)
        files.append(output / f"answers_{dataset.replace(' ', '_')}.png")
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files
