"""All plots, made from the result files. A method has the same colour and marker in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pandas as pd

from .methods import METHODS
from .paper import KV_RETRIEVAL
from .results import RESULTS
from .tables.cells import data_title, general_passages, line_title, read
from .tables.hardware import shape_title
from .tables.prompting import PROMPTING, prompting

NAMES = {"memory_tokens": "memory vectors m", "write_steps": "write steps K"}


def pyplot() -> Any:
    """Matplotlib's pyplot, without a display.

    Raises:
        ImportError: Matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'gradmem-adapter[evaluation]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def style(method: str) -> dict[str, str]:
    """The colour and the marker of a method."""
    return {"color": METHODS[method].color, "marker": METHODS[method].marker}


def shades(count: int) -> list[float]:
    """The opacity of each of several lines of one method; the last one is opaque."""
    return [0.35 + 0.65 * (i + 1) / count for i in range(count)] if count != 1 else [1.0]


def draw_all(output: Path) -> list[Path]:
    """Draw every plot into a directory; returns the files."""
    output.mkdir(parents=True, exist_ok=True)
    return [file for draw in PLOTS for file in draw(output)]


def _finish(figure: Any, file: Path, columns: int = 0) -> list[Path]:
    """Put the legend below the axes, where it hides no data, and save."""
    if columns:
        entries = [axes.get_legend_handles_labels() for axes in figure.axes]
        lines = {label: handle for handles, labels in entries for handle, label in zip(handles, labels, strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize="small")
    figure.savefig(file, dpi=130)
    pyplot().close(figure)
    return [file]


def _axes(panels: int = 1, size: tuple[float, float] = (6, 4.4), **options: Any) -> tuple[Any, Sequence[Any]]:
    plt = pyplot()
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False, **options)
    for panel in axes[0]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _ticks(axis: Any, values: Sequence[int], base: int = 2) -> None:
    """Make an axis logarithmic, with room for 0 and ticks at these numbers."""
    axis.axes.set_xscale("symlog", base=base, linthresh=1) if 0 in values else axis.axes.set_xscale("log", base=base)
    axis.set_ticks(values, [f"{value:,}" for value in values])
    axis.set_ticks([], minor=True)


def kv_retrieval(output: Path) -> list[Path]:
    """Exact match by pairs, ours and the paper's; and by write steps in training and in measurement."""
    table = read("kv_retrieval").sort_values("pairs")
    figure, (axes,) = _axes(size=(7.2, 5.2))
    several = (table["method"] != "gradmem") | (
        table["trained_steps"].str.contains("-") & table["write_steps"].isin([1, 2, 5, 10])
    )
    for method in METHODS:
        mine = table[several & (table["method"] == method)]
        groups = list(mine.groupby("write_steps"))
        for (steps, line), alpha in zip(groups, shades(len(groups)), strict=True):
            axes.plot(line["pairs"], 100 * line["exact_match"], label=line_title(method, int(steps)), alpha=alpha,
                      **style(method))  # fmt: skip
    for method in METHODS:
        paper = [(name, values) for name, kind, values in KV_RETRIEVAL if kind == method]
        for (name, values), alpha in zip(paper, shades(len(paper)), strict=True):
            axes.plot(values.keys(), values.values(), "--", label=f"paper: {name}", alpha=alpha, markersize=4,
                      **style(method))  # fmt: skip
    axes.set(
        xlabel="pairs in the context", ylabel="exact match %", ylim=(0, 103), title="Key-value retrieval, 8 vectors"
    )
    _ticks(axes.xaxis, sorted(set(table["pairs"])))
    return [*_finish(figure, output / "kv_retrieval.png", 3), *_kv_steps(table[table["method"] == "gradmem"], output)]


def _kv_steps(table: pd.DataFrame, output: Path) -> list[Path]:
    order = table["trained_steps"].map(lambda text: tuple(int(number) for number in reversed(text.split("-"))))
    table = table.assign(order=order, row=[
        f"{pairs} pairs, K={trained}" for pairs, trained in zip(table["pairs"], table["trained_steps"], strict=True)
    ]).sort_values(["pairs", "order"])  # fmt: skip
    cells = table.pivot_table(index="row", columns="write_steps", values="exact_match", sort=False)
    cells = 100 * cells[sorted(cells.columns)]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(2 + 0.7 * cells.shape[1], 1.4 + 0.4 * len(cells)), layout="constrained")
    image = axes.imshow(cells.to_numpy(), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for i, j in product(*map(range, cells.shape)):
        if not pd.isna(value := cells.iat[i, j]):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 60 else "black", size=8)
    axes.set_xticks(range(cells.shape[1]), [str(k) for k in cells.columns])
    axes.set_yticks(range(len(cells)), list(cells.index))
    axes.set(xlabel="write steps measured", ylabel="trained", title="Exact match %")
    figure.colorbar(image)
    return _finish(figure, output / "kv_retrieval_steps.png")


def answers(output: Path) -> list[Path]:
    """F1 against m and against K for each data set."""
    table = read("answers", states=1, split="test")
    files: list[Path] = []
    for dataset, mine in table.groupby("dataset"):
        figure, panels = _axes(2, (9.6, 4.8), sharey=True)
        for panel, name, other in zip(panels, NAMES, reversed(NAMES), strict=True):
            _against(panel, mine, name, other)
        panels[0].set_ylabel(f"{data_title(str(dataset))}: token F1 %")
        files += _finish(figure, output / f"answers_{str(dataset).replace(' ', '_')}.png", 3)
    return files


def _against(panel: Any, table: pd.DataFrame, name: str, other: str) -> None:
    """Plot F1 against `name`. Lines join models with the same training; a method that does not vary is a level line.

    Adapters with different names have different markers. In plots against K, the ends of lines are labelled with m.
    """
    values: set[int] = set()
    ends: list[tuple[float, float, int]] = []
    for method, mine in table.groupby("method"):
        look = style(str(method))
        varies = mine.apply(_varies, axis=1, name=name)
        for _, level in mine[~varies].iterrows():
            title = METHODS[str(method)].title_at(level["memory_tokens"])
            line = ":" if title == METHODS[str(method)].title else "-."
            panel.axhline(100 * level["f1"], linestyle=line, color=look["color"], label=title)
        varied = mine[varies].sort_values(name)
        trained = sorted(set(varied["trained_steps"]))
        solid = dict(zip(trained, shades(len(trained)), strict=True))
        names = varied["checkpoint"].fillna("") if "checkpoint" in varied else ""  # "" for adapters without a name
        varied = varied.assign(checkpoint=names)
        adapters = sorted(set(varied["checkpoint"]) - {""}, reverse=True)
        fills = {"": "full"} | dict(zip(adapters, cycle(["full", "none", "left"])))
        alike = [other, "trained_steps", "training_steps", "checkpoint"]
        for (fixed, drawn, _, adapter), line in varied.groupby(alike):
            title = METHODS[str(method)].title + (f", trained with K={drawn}" if drawn else "")
            title += f" ({adapter})" if adapter else ""
            panel.errorbar(line[name], 100 * line["f1"], 100 * line["f1_error"], capsize=2, alpha=solid[drawn],
                           label=title, fillstyle=fills[adapter], **look)  # fmt: skip
            if METHODS[str(method)].step is not None and other == "memory_tokens":
                ends.append((line[name].iloc[-1], 100 * line["f1"].iloc[-1], fixed))
        values |= set(varied[name])
    _mark_ends(panel, ends)
    panel.set(xlabel=NAMES[name])
    _ticks(panel.xaxis, sorted(values))


def _mark_ends(panel: Any, ends: Sequence[tuple[float, float, int]], apart: float = 4.0) -> None:
    """Label the ends of lines with m; ends that are too close for two labels share one."""
    labels: list[list[tuple[float, float, int]]] = []
    for end in sorted(ends):
        near = labels and labels[-1][-1][0] == end[0] and end[1] - labels[-1][-1][1] < apart
        if near:
            labels[-1].append(end)
        else:
            labels.append([end])
    for label in labels:
        place = (label[0][0], sum(height for _, height, _ in label) / len(label))
        text = "m=" + ", ".join(dict.fromkeys(str(m) for _, _, m in reversed(label)))  # from the top
        panel.annotate(
            text, place, (7, 0), textcoords="offset points", size="small", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


def _varies(row: Any, name: str) -> bool:
    """Whether a method has write steps (0 counts), or memory vectors."""
    return METHODS[row["method"]].step is not None if name == "write_steps" else row["memory_tokens"] > 0


def general(output: Path) -> list[Path]:
    """F1 of memory on passages against K for each m, and against the bytes kept for each K."""
    table = general_passages()
    files: list[Path] = []
    for dataset, mine in table.groupby("dataset"):
        figure, panels = _axes(2, (9.6, 4.8), sharey=True)
        memory = mine[mine["method"] == "gradmem"]
        sides = (("memory_tokens", "write_steps", "m", -1), ("write_steps", "bytes_per_context", "K", 0))
        for panel, (fixed, across, name, end) in zip(panels, sides, strict=True):
            groups = list(memory.groupby(fixed))
            for (value, line), alpha in zip(groups, shades(len(groups)), strict=True):
                line = line.sort_values(across)
                panel.errorbar(line[across], 100 * line["f1"], 100 * line["f1_error"], capsize=2, alpha=alpha,
                               **style("gradmem"))  # fmt: skip
                panel.annotate(f"{name}={value}", (line[across].iloc[end], 100 * line["f1"].iloc[end]),
                               (7, 0) if end else (-7, 0), textcoords="offset points", size="small", va="center",
                               ha="left" if end else "right")  # fmt: skip
            for _, level in mine[mine["method"] != "gradmem"].iterrows():
                look = METHODS[level["method"]]
                panel.axhline(100 * level["f1"], linestyle=":", color=look.color, label=look.title)
        panels[0].set(xlabel=NAMES["write_steps"], ylabel=f"{data_title(str(dataset))}: token F1 %")
        panels[1].set(xlabel="bytes kept for a text")
        _ticks(panels[0].xaxis, sorted(set(memory["write_steps"])))
        _ticks(panels[1].xaxis, sorted(set(memory["bytes_per_context"].astype(int))))
        files += _finish(figure, output / f"general_{dataset}.png", 2)
    return files


def learning_curves(output: Path) -> list[Path]:
    """Loss at the targets by minutes of training, averaged over five records; each stage restarts at the full rate."""
    table = pd.read_json(RESULTS / "learning_curves" / "general.jsonl", lines=True)
    figure, (axes,) = _axes(size=(7.2, 4.4))
    for run, line in table.groupby("run", sort=False):
        smooth = line.groupby("stage")["target_loss"].transform(lambda loss: loss.rolling(5, center=True).mean())
        axes.plot(line["minutes"], smooth, label=run)
    axes.set(xlabel="minutes of one H200", ylabel="loss at the targets, nats a token", ylim=(0.4, 1.6))
    return _finish(figure, output / "learning_curves.png", 3)


def reconstruction(output: Path) -> list[Path]:
    """Tokens that greedy decoding gets back, by K."""
    table = read("reconstruction").sort_values("write_steps")
    figure, (axes,) = _axes(size=(6, 4))
    for (checkpoint, m), line in table.groupby(["checkpoint", "memory_tokens"]):
        axes.errorbar(line["write_steps"], line["greedy_tokens"], line["greedy_tokens_error"], capsize=2,
                      label=f"{checkpoint}, m={m}", **style("gradmem"))  # fmt: skip
    tokens = int(table["tokens"].iloc[0])
    axes.axhline(tokens, linestyle=":", color="gray", label=f"all {tokens} tokens of a passage")
    axes.set(xlabel=NAMES["write_steps"], ylabel="tokens that greedy decoding gets back", ylim=(0, 1.08 * tokens))
    _ticks(axes.xaxis, sorted(set(table["write_steps"])))
    return _finish(figure, output / "reconstruction.png", 2)


def versus_prompting(output: Path) -> list[Path]:
    """Time to first token and bytes by context tokens: memory, the context's KV cache, and reading the context again.

    There is a plot for each shape and hardware with measurements at several lengths.
    """
    memory, text, kept = style("gradmem"), style("full_context"), {"linestyle": "--", "fillstyle": "none"}
    pressed = {"color": "#e69f00", "marker": "P"}
    times = {
        "memory_ms": ("memory state", memory),
        "memory_kept_ms": ("its keys and values, kept", memory | kept),
        "kept_ms": ("context's KV cache, kept", text | kept),
        "press_ms": ("KV cache of the state's bytes, by kvpress", pressed),
        "prefill_ms": ("context, read again", text),
    }
    sizes = {"state": "memory_ms", "memory_kv": "memory_kept_ms", "context_kv": "kept_ms", "press": "press_ms"}
    lines = [(f"first_token_{name}", *look) for name, look in times.items()]
    panels = {"time to first token (ms)": lines, "bytes kept": [(f"{k}_bytes", *times[v]) for k, v in sizes.items()]}
    files: list[Path] = []
    for which in PROMPTING:
        if len(table := prompting(which)) < 2:
            continue
        figure, found = _axes(2, (9.6, 4.8))
        for axes, (ylabel, entries) in zip(found, panels.items(), strict=True):
            for column, label, look in entries:
                line = table.reindex(columns=["context_tokens", column]).dropna()
                if len(line):
                    axes.plot(line["context_tokens"], line[column], label=label, **look)
            axes.set(xlabel="context tokens", ylabel=ylabel, yscale="log")
            _ticks(axes.xaxis, table["context_tokens"].tolist())
        row = table.iloc[-1]
        vectors = f"{row['memory_tokens']:.0f} vectors, K={row['write_steps']:.0f}"
        figure.suptitle(f"{shape_title(row)}'s shape, random weights, {row['dtype']}, {row['hardware']}; {vectors}")
        files += _finish(figure, output / f"versus_prompting_{which}.png", 3)
    return files


PLOTS: tuple[Callable[[Path], list[Path]], ...] = (
    kv_retrieval, answers, general, learning_curves, reconstruction, versus_prompting,
)  # fmt: skip
