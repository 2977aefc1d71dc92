"""Results on key-value retrieval: records in one JSON file, and everything that is shown made from it alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .records import pyplot

PAPER: dict[str, dict[int, float]] = {
    "full context": {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 97, 96: 99},
    "forward-only writer (RMT)": {4: 100, 8: 100, 16: 45, 32: 44, 64: 19, 96: 13},
    "GradMem, 1 step": {4: 100, 8: 100, 16: 96, 32: 86.9, 64: 58.6, 96: 33},
    "GradMem, 5 steps": {4: 100, 8: 100, 16: 100, 32: 99.8, 64: 99, 96: 88.4},
}
"""Exact match % by pairs, as arXiv 2603.13875 gives it for 8 memory vectors (values read off a plot are rounded)."""
TASK = "kv_retrieval"
NAMES = {"gradmem": "GradMem", "forward_memory": "forward-only memory", "full_context": "full context"}


@dataclass(frozen=True)
class KVRecord:
    """One measurement."""

    method: str
    trained_steps: str
    """The write steps (or passes) that training drew from, as "5" or "1-12"."""
    pairs: int
    write_steps: int
    exact_match: float
    """Share of queries whose value greedy decoding gets right."""
    queries: int
    """How many queries that is measured on."""
    seed: int
    training_steps: int
    device: str
    """Where it was measured."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What a later measurement replaces."""
        return self.method, self.trained_steps, self.pairs, self.write_steps

    @property
    def one_number(self) -> bool:
        """Whether this is GradMem trained with one number of write steps alone."""
        return self.method == "gradmem" and self.trained_steps.isdigit()

    @property
    def line(self) -> str:
        """The method and the write steps, as a table or a legend names them."""
        name = NAMES[self.method]
        if self.method == "full_context":
            return name
        if self.one_number:
            name += f" trained with K={self.trained_steps}"
        unit = "step" if self.method == "gradmem" else "pass"
        plural = "" if self.write_steps == 1 else "s" if unit == "step" else "es"
        return f"{name}, {self.write_steps} {unit}{plural}"


def by_line(records: Iterable[KVRecord]) -> dict[str, dict[int, float]]:
    """Exact match % of each line of a table, by pairs."""
    lines: dict[str, dict[int, float]] = {}
    for record in sorted(records, key=_place):
        lines.setdefault(record.line, {})[record.pairs] = 100 * record.exact_match
    return lines


def _place(record: KVRecord) -> tuple[int, str, int]:
    alone = record.trained_steps if record.one_number else ""
    return list(NAMES).index(record.method), alone, record.write_steps


def table(records: Sequence[KVRecord], paper: bool = False) -> Table:
    """Exact match % by method and number of pairs."""
    lines = by_line(records)
    pairs = sorted({n for values in lines.values() for n in values})
    result = Table("exact match %", *(f"{n} pairs" for n in pairs), title="Key-value retrieval, greedy decoding")
    blocks = [("", lines)]
    if paper:
        blocks.append(("paper: ", PAPER))
    for prefix, block in blocks:
        for name, values in block.items():
            result.add_row(prefix + name, *(f"{values[n]:.1f}" if n in values else "" for n in pairs))
        result.add_section()
    return result


def plot(records: Sequence[KVRecord], output: Path) -> list[Path]:
    """Draw exact match against pairs, ours beside the paper's, and write steps trained against write steps evaluated.

    Returns:
        The files made in the directory `output`.
    """
    output.mkdir(parents=True, exist_ok=True)
    return [_plot_pairs(records, output / "kv_retrieval.png"), _plot_steps(records, output / "kv_retrieval_steps.png")]


def _plot_pairs(records: Sequence[KVRecord], file: Path) -> Path:
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    shown = [r for r in records if r.method != "gradmem" or (r.write_steps in (1, 2, 5, 30) and not r.one_number)]
    for panel, title, lines in zip(panels, ("this repository", "paper"), (by_line(shown), PAPER), strict=True):
        for name, values in lines.items():
            panel.plot(list(values), list(values.values()), marker="o", label=name)
        panel.set(title=f"Key-value retrieval, 8 memory vectors: {title}", xlabel="pairs in the context", ylim=(0, 102))
        panel.set_xscale("log", base=2)
        panel.set_xticks([4, 8, 16, 32, 64, 96], ["4", "8", "16", "32", "64", "96"])
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", loc="lower left")
    panels[0].set_ylabel("exact match %")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _most_first(trained_steps: str) -> list[int]:
    """The numbers of "5" or "1-20", the larger first: so are rows in order."""
    return [int(number) for number in reversed(trained_steps.split("-"))]


def _plot_steps(records: Sequence[KVRecord], file: Path) -> Path:
    plt = pyplot()
    ours = [record for record in records if record.method == "gradmem"]
    rows = sorted({(r.pairs, r.trained_steps) for r in ours}, key=lambda row: (row[0], _most_first(row[1])))
    columns = sorted({r.write_steps for r in ours})
    values = {((r.pairs, r.trained_steps), r.write_steps): 100 * r.exact_match for r in ours}
    cells = [[values.get((row, k), float("nan")) for k in columns] for row in rows]
    figure, axes = plt.subplots(figsize=(1.5 + 0.75 * len(columns), 1.5 + 0.4 * len(rows)))
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell == cell:  # not NaN
                axes.text(
                    j, i, f"{cell:.1f}", ha="center", va="center", color="white" if cell < 60 else "black", size=8
                )
    axes.set_xticks(range(len(columns)), [str(k) for k in columns])
    axes.set_yticks(range(len(rows)), [f"{pairs} pairs, K={trained}" for pairs, trained in rows])
    axes.set(xlabel="write steps evaluated", ylabel="trained", title="Exact match %")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
