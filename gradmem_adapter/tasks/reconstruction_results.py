"""Results on natural text: measuring what comes back of its passages, and everything that is shown of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from peft import PeftModel
from rich.table import Table

from .reconstruction import NextChunk, Passage, Reconstruction, next_chunk, reconstruction
from .records import device_name, pyplot

TASK = "reconstruction"


@dataclass(frozen=True)
class ReconstructionRecord:
    """One measurement: passages of a text, written and decoded greedily from memory alone."""

    checkpoint: str
    memory_tokens: int
    text: str
    """The name of its file."""
    tokens: int
    """Of a passage."""
    passages: int
    write_steps: int
    optimizer: str
    """Of WRITE, "sgd" or "adam"."""
    lr: float | None
    """Of every write step; None: the adapter's own."""
    device: str
    greedy_tokens: float
    """How many tokens of a passage greedy decoding gets right, place by place."""
    greedy_tokens_error: float
    """Standard error of the mean over passages, as of the others; 0 for a single one."""
    greedy: float
    """The same as a share."""
    greedy_error: float
    teacher_forced: float
    """Share of tokens that are the first choice given the true ones before."""
    teacher_forced_error: float
    whole: float
    """Share of passages without a mistake."""
    whole_error: float
    write_loss: float
    """After the last write step, nats a token."""
    write_loss_error: float
    next_memory: float | None = None
    """Nats a token of the passage that follows, given the memory of the one before; None: not measured."""
    next_memory_error: float | None = None
    next_nothing: float | None = None
    """The same given nothing."""
    next_nothing_error: float | None = None
    next_text: float | None = None
    """The same given the passage before as text."""
    next_text_error: float | None = None

    @property
    def key(self) -> tuple[tuple[str, int, int], tuple[str, int, str, float], int]:
        """What a later measurement replaces."""
        return self.data, (self.checkpoint, self.memory_tokens, self.optimizer, self.lr or 0.0), self.write_steps

    @property
    def data(self) -> tuple[str, int, int]:
        """What was written: text, tokens of a passage, passages. Only records that agree in it can be compared."""
        return self.text, self.tokens, self.passages

    @property
    def title(self) -> str:
        """The data, as a table and a plot name them."""
        return f"{self.text}: {self.passages} passage{'s' * (self.passages != 1)} of {self.tokens} tokens"

    @property
    def model(self) -> str:
        """The checkpoint with its m."""
        return f"{self.checkpoint}, m={self.memory_tokens}"

    @property
    def rates(self) -> str:
        """The write optimizer and its rate."""
        return f"{self.optimizer}, {'own rates' if self.lr is None else f'{self.lr:g}'}"


def measure(
    model: PeftModel,
    texts: Sequence[Passage],
    *,
    checkpoint: str,
    text: str,
    steps: int,
    optimizer: str | None = None,
    lr: float | None = None,
) -> ReconstructionRecord:
    """WRITE passages that follow one another, decode them, and predict each from the memory of the one before.

    The latter is left out for a single passage, and where two do not fit into the model's positions.

    Args:
        texts: passages of equal length, at least 2 tokens each.
        checkpoint, text: names, for the record.
        steps, optimizer, lr: of WRITE; None: the adapter's own.

    Raises:
        ValueError: passages too long for the model, an unknown optimizer, or a rate that is none.
    """
    config, tokens = model.active_peft_config, len(texts[0])
    state = model.write_many(texts, progress=False, steps=steps, optimizer=optimizer, lr=lr)
    numbers = _numbers(reconstruction(model, texts, state=state))
    if len(texts) > 1 and (model.positions is None or 2 * tokens <= model.positions):
        following = next_chunk(model, list(pairwise(texts)), state=state[:-1])
        numbers |= _numbers(following, "next_")
    return ReconstructionRecord(
        checkpoint=checkpoint,
        memory_tokens=config.num_memory_tokens,
        text=text,
        tokens=tokens,
        passages=len(texts),
        write_steps=steps,
        optimizer=optimizer or config.write_optimizer,
        lr=lr,
        device=device_name(model.device),
        **numbers,
    )


def _numbers(found: Reconstruction | NextChunk, prefix: str = "") -> dict[str, float]:
    """The fields of a record that hold estimates. A single value has no standard error, and JSON no NaN: 0 then."""
    numbers = {}
    for name, (mean, error) in found._asdict().items():
        numbers[prefix + name] = mean
        numbers[f"{prefix}{name}_error"] = 0.0 if math.isnan(error) else error
    return numbers


def tables(records: Sequence[ReconstructionRecord]) -> list[Table]:
    """One table for each text, length of passages and checkpoint: what came back, by optimizer and K."""
    found = sorted(records, key=lambda r: r.key)
    result = []
    for data, model in dict.fromkeys((r.data, r.model) for r in found):
        mine = [r for r in found if (r.data, r.model) == (data, model)]
        table = Table(title=f"{mine[0].title}, greedy decoding from memory alone\n{model}")
        for heading in (
            "optimizer,\nrate", "K", f"greedy tokens\nof {mine[0].tokens}", "greedy\n%", "teacher-\nforced %",
            "whole\n%", "write\nloss", "next passage, perplexity\nmemory / nothing / text",
        ):  # fmt: skip
            table.add_column(heading)
        for r in mine:
            following = (r.next_memory, r.next_nothing, r.next_text)
            table.add_row(
                r.rates,
                str(r.write_steps),
                f"{r.greedy_tokens:.1f} ± {r.greedy_tokens_error:.1f}",
                *(f"{100 * share:.1f}" for share in (r.greedy, r.teacher_forced, r.whole)),
                f"{r.write_loss:.3f}",
                " / ".join(_perplexity(nats) for nats in following if nats is not None),
            )
        result.append(table)
    return result


def _perplexity(nats: float) -> str:
    return f"{math.exp(nats):.1f}" if nats < 12 else f"e^{nats:.1f}"  # a model thrown off by its memory has no bound


def plot(records: Sequence[ReconstructionRecord], output: Path) -> list[Path]:
    """Draw greedy tokens against K, a panel for each text and length of passages.

    Returns:
        The file made in the directory `output`.
    """
    plt = pyplot()
    output.mkdir(parents=True, exist_ok=True)
    found = sorted(records, key=lambda r: r.key)
    groups = list(dict.fromkeys(r.data for r in found))
    figure, panels = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False, layout="constrained")
    for panel, data in zip(panels[0], groups, strict=True):
        mine = [r for r in found if r.data == data]
        for model, rates in dict.fromkeys((r.model, r.rates) for r in mine):
            line = [r for r in mine if (r.model, r.rates) == (model, rates)]
            panel.errorbar(
                [r.write_steps for r in line], [r.greedy_tokens for r in line], [r.greedy_tokens_error for r in line],
                marker="o", capsize=2, label=f"{model}, {rates}",
            )  # fmt: skip
        steps = sorted({r.write_steps for r in mine})
        panel.set_xscale("symlog", base=2, linthresh=1)  # K may be 0
        panel.set_xticks(steps, [str(k) for k in steps])
        panel.minorticks_off()
        panel.axhline(mine[0].tokens, linestyle=":", color="gray")
        panel.set(title=mine[0].title, xlabel="write steps K", ylabel="tokens that greedy decoding gets back", ylim=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    file = output / "reconstruction.png"
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
