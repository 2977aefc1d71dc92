"""`gradmem eval --text` and `gradmem plot`: what comes back of a text's passages, as records, tables and a plot."""

import gzip
import io
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.axes import Axes
from peft import get_peft_model
from rich.console import Console
from tiny import tiny, tiny_text, tiny_tokenizer
from typer.testing import CliRunner

from gradmem_adapter import GradMemConfig, load_backbone, load_checkpoint, save_checkpoint
from gradmem_adapter.cli import app
from gradmem_adapter.tasks.reconstruction import next_chunk, passages, reconstruction
from gradmem_adapter.tasks.reconstruction_results import TASK, ReconstructionRecord, measure, plot, tables
from gradmem_adapter.tasks.records import add_records, load_records

TEXT = f" = Title = \n\n{tiny_text(40)}\n{tiny_text(60, seed=1)}\n"
ADAM = ["--optimizer", "adam", "--lr", "0.05"]
ESTIMATES = (
    "greedy_tokens", "greedy", "teacher_forced", "whole", "write_loss", "next_memory", "next_nothing", "next_text",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in `model` and a gzipped text in `text.gz`."""
    folder = tmp_path_factory.mktemp("reconstruction")
    tiny().save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    backbone, tokenizer = load_backbone(str(folder / "backbone"))
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=4, memory_init_std=0.5, write_lr=0.3))
    save_checkpoint(model, tokenizer, folder / "model")
    (folder / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    return folder


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])


def evaluate(folder, *arguments, tokens=7, count=10):
    usual = ("--text", folder / "text.gz", "--tokens", tokens, "--passages", count, "--device", "cpu")
    return invoke("eval", folder / "model", *usual, *arguments)


def rows(output):
    """The cells of a printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def record(**fields):
    estimates = {f"{name}{end}": value for name in ESTIMATES for end, value in (("", 0.5), ("_error", 0.125))}
    values = {
        "checkpoint": "a", "memory_tokens": 16, "text": "t.txt", "tokens": 128, "passages": 64, "write_steps": 2,
        "optimizer": "sgd", "lr": None, "device": "CPU",
    } | estimates  # fmt: skip
    return ReconstructionRecord(**values | fields)


def shown(records):
    console = Console(width=300, record=True, file=io.StringIO())
    for table in tables(records):
        console.print(table)
    return console.export_text()


def test_the_command_measures_what_the_functions_do(folder, tmp_path):
    results = tmp_path / "new" / "reconstruction.json"
    result = evaluate(folder, "--steps", "1,60", *ADAM, "--results", results)
    assert result.exit_code == 0, result.output
    model, tokenizer = load_checkpoint(folder / "model")
    texts = passages(TEXT, tokenizer, 7, 10)
    found = load_records(results, TASK, ReconstructionRecord)
    assert [r.write_steps for r in found] == [1, 60]
    for r, cells in zip(found, rows(result.output), strict=True):
        options = {"steps": r.write_steps, "lr": 0.05, "optimizer": "adam"}
        back = reconstruction(model, texts, **options)
        following = next_chunk(model, list(pairwise(texts)), **options)
        for name in ESTIMATES:
            source = following if name.startswith("next_") else back
            mean, error = getattr(source, name.removeprefix("next_"))
            assert getattr(r, name) == pytest.approx(mean), name
            assert getattr(r, f"{name}_error") == pytest.approx(error), name
        assert cells == [
            "adam, 0.05", str(r.write_steps),
            f"{back.greedy_tokens.mean:.1f} ± {back.greedy_tokens.error:.1f}",
            f"{100 * back.greedy.mean:.1f}", f"{100 * back.teacher_forced.mean:.1f}", f"{100 * back.whole.mean:.1f}",
            f"{back.write_loss.mean:.3f}",
            " / ".join(
                f"{math.exp(nats):.1f}" if nats < 12 else f"e^{nats:.1f}"
                for nats in (following.memory.mean, following.nothing.mean, following.text.mean)
            ),
        ]  # fmt: skip
    few, many = found
    assert many.greedy_tokens > few.greedy_tokens > 0
    assert many.greedy_tokens_error > 0
    for r in found:
        assert (r.checkpoint, r.memory_tokens, r.text, r.tokens, r.passages) == ("model", 4, "text.gz", 7, 10)
        assert (r.optimizer, r.lr, r.device) == ("adam", 0.05, "CPU")
    assert "text.gz: 10 passages of 7 tokens, greedy decoding from memory alone" in result.output
    assert "model, m=4" in result.output


def test_a_second_run_replaces_equal_keys_and_no_others(folder, tmp_path):
    """Without --optimizer and --lr WRITE is the adapter's own, which is another key than any rate."""
    results = tmp_path / "reconstruction.json"
    command = ("--steps", "2", "--results", results)
    for more in ((), ADAM):
        result = evaluate(folder, *command, *more, count=3)
        assert result.exit_code == 0, result.output
    first = load_records(results, TASK, ReconstructionRecord)
    assert [(r.optimizer, r.lr) for r in first] == [("adam", 0.05), ("sgd", None)]
    model, tokenizer = load_checkpoint(folder / "model")
    expected = reconstruction(model, passages(TEXT, tokenizer, 7, 3), steps=2).write_loss.mean
    by_rates = {r.rates: r for r in first}
    assert by_rates["sgd, own rates"].write_loss == pytest.approx(expected)
    assert by_rates["adam, 0.05"].write_loss != pytest.approx(expected)
    wrong = [replace(r, write_loss=99.0) for r in first]
    add_records(results, TASK, ReconstructionRecord, wrong)
    assert load_records(results, TASK, ReconstructionRecord) == wrong
    assert evaluate(folder, *command, count=3).exit_code == 0
    again = {r.rates: r.write_loss for r in load_records(results, TASK, ReconstructionRecord)}
    assert again == {"sgd, own rates": pytest.approx(expected), "adam, 0.05": 99.0}


def test_a_single_passage_has_no_errors_and_none_after_it(folder, tmp_path):
    results = tmp_path / "reconstruction.json"
    result = evaluate(folder, "--steps", "0", "--results", results, count=1)
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output.lower()
    (r,) = json.loads(results.read_text())["records"]
    assert (r["greedy_tokens_error"], r["write_loss_error"], r["next_memory"], r["next_text_error"]) == (
        0,
        0,
        None,
        None,
    )
    assert r["write_loss"] > 0
    (cells,) = rows(result.output)
    assert cells[-1] == ""


@pytest.mark.parametrize(("tokens", "fits"), [(48, True), (49, False)])
def test_what_follows_is_left_out_where_two_passages_do_not_fit(folder, tokens, fits):
    model, tokenizer = load_checkpoint(folder / "model")
    assert model.positions == 96
    found = measure(model, passages(TEXT, tokenizer, tokens, 2), checkpoint="model", text="text.gz", steps=1)
    assert (found.next_memory is not None) is fits
    assert found.write_loss > 0


def test_a_trained_recipe_is_no_hindrance_and_names_of_runs_tell_them_apart(folder, tmp_path):
    """`gradmem train` calls every finished model `checkpoint`."""
    model, tokenizer = load_checkpoint(folder / "model")
    for run in ("one", "two"):
        save_checkpoint(model, tokenizer, tmp_path / run / "checkpoint")
        (tmp_path / run / "checkpoint" / "recipe.json").write_text('{"task": "answers"}', encoding="utf-8")
        result = invoke(
            "eval", tmp_path / run / "checkpoint", "--text", folder / "text.gz", "--tokens", 5, "--passages", 2,
            "--steps", "1", "--results", tmp_path / "reconstruction.json", "--device", "cpu",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    found = load_records(tmp_path / "reconstruction.json", TASK, ReconstructionRecord)
    assert [r.checkpoint for r in found] == ["one/checkpoint", "two/checkpoint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "rows.jsonl"], "--rows does not apply to --text: leave one of them out."),
        (["--pairs", "4,8,16,32,64,96"], "--pairs does not apply to --text"),  # though it is the default
        (["--contexts", "4"], "--contexts does not apply to --text"),
        (["--seed", "1"], "--seed does not apply to --text"),
        (["--split", "test"], "--split does not apply to --text"),
        (["--states", "1"], "--states does not apply to --text"),
        (["--limit", "4"], "--limit does not apply to --text"),
        (["--passages", "15"], "The text has 100 tokens: 14 passages of 7, not 15."),
        (["--tokens", "93"], "Context 0 of 1 cannot be written. It has 93 tokens, and at most 92"),
        (["--tokens", "1"], "Invalid value for '--tokens'"),
        (["--steps", "1,x"], "--steps takes integers"),
        (["--optimizer", "lion"], "optimizer must be one of ('sgd', 'adam'), got 'lion'"),
        (["--lr", "nan"], "lr must be a finite positive number"),
        (["--results", "."], "is a directory"),
    ],
)
def test_what_cannot_be_measured(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    count = 10 if "--passages" in arguments else 1
    result = evaluate(folder, "--results", "reconstruction.json", *arguments, count=count)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["tokens", "passages", "optimizer", "lr"])
def test_options_of_a_text_need_one(folder, option):
    value = "adam" if option == "optimizer" else "4"
    result = invoke("eval", folder / "model", f"--{option}", value)
    assert result.exit_code == 2
    assert f"--{option} belongs to --text" in " ".join(result.stderr.split())


def test_each_text_length_and_checkpoint_has_a_table():
    text = shown(
        [
            record(write_steps=20, greedy_tokens=88.25, greedy_tokens_error=1.5),
            record(write_steps=5, next_memory=800.0),
            record(lr=0.03, optimizer="adam"),
            record(checkpoint="b"),
            record(tokens=32, passages=1),
        ]
    )
    titles = [" ".join(line.split()) for line in text.splitlines() if "t.txt" in line or "m=16" in line]
    assert titles == [
        "t.txt: 1 passage of 32 tokens, greedy decoding from memory alone",
        "a, m=16",
        "t.txt: 64 passages of 128 tokens, greedy decoding from memory alone",
        "a, m=16",
        "t.txt: 64 passages of 128 tokens, greedy decoding from memory alone",
        "b, m=16",
    ]
    cells = rows(text)
    assert [row[:2] for row in cells if len(row) == 8] == [
        ["sgd, own rates", "2"], ["adam, 0.03", "2"], ["sgd, own rates", "5"], ["sgd, own rates", "20"],
        ["sgd, own rates", "2"],
    ]  # fmt: skip
    assert cells[3][2] == "88.2 ± 1.5"
    assert cells[2][-1] == "e^800.0 / 1.6 / 1.6"


def test_plot_draws_a_line_for_each_checkpoint_and_optimizer(tmp_path, monkeypatch):
    drawn = {}
    errorbar = Axes.errorbar

    def spy(self, x, y, error, **options):
        drawn[self.get_subplotspec().num1, options["label"]] = (x, y, error)
        return errorbar(self, x, y, error, **options)

    monkeypatch.setattr(Axes, "errorbar", spy)
    records = [
        record(write_steps=20, greedy_tokens=88.0, greedy_tokens_error=1.5),
        record(write_steps=0, greedy_tokens=3.0),
        record(lr=0.03, optimizer="adam"),
        record(checkpoint="b"),
        record(tokens=32),
    ]
    add_records(tmp_path / "r.json", TASK, ReconstructionRecord, records)
    result = invoke("plot", tmp_path / "r.json", "--output", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    assert drawn == {
        (0, "a, m=16, sgd, own rates"): ([2], [0.5], [0.125]),
        (1, "a, m=16, adam, 0.03"): ([2], [0.5], [0.125]),
        (1, "a, m=16, sgd, own rates"): ([0, 20], [3.0, 88.0], [0.125, 1.5]),
        (1, "b, m=16, sgd, own rates"): ([2], [0.5], [0.125]),
    }
    assert len(rows(result.output)) == 5
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["reconstruction.png"]
    assert (tmp_path / "plots" / "reconstruction.png").stat().st_size > 10_000
    assert plot(records[:1], tmp_path) == [tmp_path / "reconstruction.png"]
