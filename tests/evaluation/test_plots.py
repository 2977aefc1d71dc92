"""Plots: one look for each method, legends beside the data, the paper's curves among ours."""

import pytest
from typer.testing import CliRunner

from evaluation import plots
from evaluation.cli import app
from evaluation.methods import METHODS
from evaluation.plots import draw_all, shades, style
from evaluation.results import Record, add_records


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept until the test is over."""
    drawn, close = [], plots.pyplot().close
    monkeypatch.setattr(plots.pyplot(), "close", drawn.append)
    yield drawn
    close("all")


def test_every_plot_is_drawn(tmp_path, figures):
    files = draw_all(tmp_path)
    assert all(file.stat().st_size > 10_000 for file in files)
    assert {"kv_retrieval.png", "kv_retrieval_steps.png", "answers_babi_2.png", "reconstruction.png"} <= {
        file.name for file in files
    }
    for figure in figures:
        figure.draw_without_rendering()
        for legend in figure.legends:  # legends of axes would cover the data
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
        assert not any(axes.get_legend() for axes in figure.axes)


def test_labels_of_lines_do_not_overlap(tmp_path, figures):
    plots.answers(tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_each_adapter_has_its_own_marker(tmp_path, figures):
    plots.answers(tmp_path)
    entries = [zip(*reversed(axes.get_legend_handles_labels()), strict=True) for axes in figures[0].axes]
    fills = {label: bars[0].get_fillstyle() for entry in entries for label, bars in entry if "smollm2" in label}
    assert len(fills) == len(set(fills.values())) == 2


def test_the_papers_curves_are_dashed_in_our_colours(tmp_path, figures):
    plots.kv_retrieval(tmp_path)
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert lines["paper: GradMem, 5 steps"].get_linestyle() == "--"
    assert lines["GradMem, 5 steps"].get_linestyle() == "-"
    for ours, paper in (("GradMem, 5 steps", "GradMem, 5 steps"), ("full context", "full context"),
                        ("forward-only memory, 1 pass", "forward-only writer (RMT)")):  # fmt: skip
        assert lines[ours].get_color() == lines[f"paper: {paper}"].get_color()
    rows = [label.get_text() for label in figures[1].axes[0].get_yticklabels()]
    assert rows[2:6] == ["16 pairs, K=1", "16 pairs, K=2", "16 pairs, K=5", "16 pairs, K=1-5"]


def test_each_method_has_its_own_style():
    for part in ("color", "marker"):
        assert len({style(method)[part] for method in METHODS}) == len(METHODS)
    assert shades(1) == [1]
    assert shades(3) == sorted(shades(3))


def test_runs_trained_alike_form_one_line(tmp_path, monkeypatch, figures):
    def record(m, steps, f1, trained="0-1", training_steps=100):
        return Record(
            task="passages", method="gradmem", dataset="tales", split="test", memory_tokens=m, trained_steps=trained,
            write_steps=steps, states=1, metrics={"f1": f1}, errors={"f1": 0.1}, n=10, training_steps=training_steps,
        )  # fmt: skip

    add_records(tmp_path / "answers.jsonl", [
        record(16, 0, 0.5), record(16, 1, 0.6), record(32, 0, 0.7, training_steps=200), record(16, 0, 0.4, trained="0"),
    ])  # fmt: skip
    monkeypatch.setattr("evaluation.tables.cells.RESULTS", tmp_path)
    plots.answers(tmp_path)
    against_m, against_k = (
        sorted((line.get_xdata().tolist(), line.get_ydata().tolist()) for line, *_ in axes.containers)
        for axes in figures[0].axes
    )
    assert against_k == [([0], [40]), ([0], [70]), ([0, 1], [50, 60])]
    assert against_m == [([16], [40]), ([16], [50]), ([16], [60]), ([32], [70])]


def test_plots_of_memory_against_prompting(tmp_path, monkeypatch, figures):
    """One per shape and hardware with several lengths, named in the title; unmeasured methods have no line."""
    names = ["memory", "memory_kept", "kept", "press", "prefill"]
    for shape, lengths, pressed in (("llama-3.1-8b", (1024, 65536), True), ("smollm2-1.7b", (1024,), True),
                                    ("qwen2.5-0.5b", (2048, 1024), False)):  # fmt: skip
        add_records(tmp_path / "versus_prompting.jsonl", [
            Record(
                task="versus_prompting", method="answer", memory_tokens=64, write_steps=1,
                settings={"hardware": "NVIDIA H200", "shape": shape, "dtype": "bfloat16", "date": "2026-11-29",
                          "kind": "answer", "context_tokens": length},
                metrics={f"first_token_{name}_ms": float(length) for name in names if pressed or name != "press"}
                | {f"{name}_bytes": float(length) for name in ("state", "memory_kv", "context_kv")},
            )
            for length in lengths
        ])  # fmt: skip
    monkeypatch.setattr("evaluation.tables.cells.RESULTS", tmp_path)
    assert [file.stem for file in plots.versus_prompting(tmp_path)] == ["versus_prompting_8b", "versus_prompting_0.5b"]
    assert "Llama-3.1-8B's shape" in figures[0].get_suptitle()
    assert "NVIDIA H200" in figures[0].get_suptitle()
    assert [[len(axes.lines) for axes in figure.axes] for figure in figures] == [[5, 3], [4, 3]]
    assert [line.get_xdata().tolist() for line in figures[1].axes[0].lines] == [[1024, 2048]] * 4


def test_the_command_writes_the_plots(tmp_path):
    result = CliRunner().invoke(app, ["plots", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kv_retrieval.png").exists()
