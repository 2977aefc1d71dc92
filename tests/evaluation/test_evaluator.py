"""What is measured of answers, and shown."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console
from test_qa_training import folder, recipe  # noqa: F401 - a fixture
from typer.testing import CliRunner

from gradmem_adapter.cli import app
from gradmem_adapter.tasks import qa_results
from gradmem_adapter.tasks.qa_results import TASK, QARecord, distractors, measure, plot, tables
from gradmem_adapter.tasks.qa_training import Answerer, questions
from gradmem_adapter.tasks.records import add_records, load_records, pyplot, task_of
from gradmem_adapter.tasks.saved import save_model
from gradmem_adapter.training_runs import evaluate_answers

BYTES_PER_TOKEN = 4 * 2 * 2 * 2 * 8  # keys and values of 2 layers with 2 heads of 8, in float32


def record(**fields):
    values = {
        "dataset": "babi 1", "split": "test", "method": "gradmem", "memory_tokens": 16, "write_steps": 2, "states": 1,
        "exact_match": 0.5,
        "exact_match_error": 0.1, "f1": 0.6, "f1_error": 0.1, "rouge_l": 0.7, "rouge_l_error": 0.1, "questions": 10,
        "context_tokens": 50.0, "bytes_per_context": 1000.0, "full_bytes": 5000.0, "trained_steps": "1-5",
        "training_steps": 100, "seed": 0, "device": "CPU",
    }  # fmt: skip
    return QARecord(**values | fields)


class Fixed(Answerer):
    """Gives answers that are known."""

    def __init__(self, model, tokenizer, plan, answers):
        super().__init__(model, tokenizer, plan, steps=2)
        self.answers, self.reads = answers, None

    def answer(self, contexts, queries, reads):
        self.reads = reads
        return self.answers


def test_measure(folder):  # noqa: F811
    plan = recipe(folder)
    model, tokenizer = plan.build()
    rows = plan.sources[0].rows("test")
    references = questions(rows)[3]
    answers = [accepted[0] if i % 3 == 0 else "nothing" for i, accepted in enumerate(references)]
    shown = []
    answerer = Fixed(model, tokenizer, plan, answers)
    found = measure(answerer, rows, "short", states=3, seed=1, show=shown.append)
    assert (found.questions, found.exact_match, found.f1) == (12, pytest.approx(1 / 3), pytest.approx(1 / 3))
    hits = torch.tensor([1.0 if i % 3 == 0 else 0.0 for i in range(12)])
    assert found.exact_match_error == pytest.approx(hits.std().item() / math.sqrt(12))
    assert (found.context_tokens, found.bytes_per_context) == (9, 3 * 32 * 4)
    assert found.full_bytes == 9 * BYTES_PER_TOKEN
    assert [line["answer"] for line in shown] == answers
    assert [line["exact_match"] for line in shown] == hits.tolist()
    assert [line["accepted"] for line in shown] == references
    assert all(i in reads for i, reads in zip(questions(rows)[2], answerer.reads, strict=True))


@pytest.mark.parametrize(
    ("method", "kept", "steps"),
    [("full_context", 9 * BYTES_PER_TOKEN, 0), ("truncated_text", 3 * BYTES_PER_TOKEN, 0), ("no_context", 0, 0),
     ("mean_pooling", 3 * 32 * 4, 0), ("forward_memory", 3 * 32 * 4, 2)],
)  # fmt: skip
def test_bytes_that_are_kept(folder, method, kept, steps):  # noqa: F811
    plan = recipe(folder, method)
    model, tokenizer = plan.build()
    rows = plan.sources[0].rows("test")
    found = measure(Fixed(model, tokenizer, plan, ["w1"] * 12), rows, "short")
    assert (found.bytes_per_context, found.write_steps) == (kept, steps)


def test_distractors():
    reads = distractors([0, 1, 2, 2], 5, 3, seed=0)
    assert all(own in row and len(set(row)) == 3 for own, row in zip([0, 1, 2, 2], reads, strict=True))
    assert reads == distractors([0, 1, 2, 2], 5, 3, seed=0)
    assert {row.index(7) for row in distractors([7] * 50, 9, 4, seed=0)} == {0, 1, 2, 3}
    assert distractors([3], 9, 1, seed=0) == [[3]]
    with pytest.raises(ValueError, match="There are 2 contexts"):
        distractors([0], 2, 3, seed=0)


def test_records_are_replaced_by_key_and_belong_to_a_task(tmp_path):
    file = tmp_path / "answers.json"
    add_records(file, TASK, QARecord, [record(), record(write_steps=5)])
    add_records(file, TASK, QARecord, [record(f1=0.9)])
    assert {r.write_steps: r.f1 for r in load_records(file, TASK, QARecord)} == {2: 0.9, 5: 0.6}
    add_records(file, TASK, QARecord, [record(split="valid"), record(trained_steps="2")])
    assert len(load_records(file, TASK, QARecord)) == 4
    assert task_of(file) == TASK
    with pytest.raises(ValueError, match="results on answers, not on other"):
        load_records(file, "other", QARecord)
    file.write_text("[]")
    with pytest.raises(ValueError, match="no file of results"):
        task_of(file)


def test_records_of_several_processes_are_all_kept(tmp_path):
    file = tmp_path / "answers.json"

    def add(first):
        for k in range(first, first + 20):
            add_records(file, TASK, QARecord, [record(write_steps=k)])

    with ThreadPoolExecutor(4) as pool:  # each has a lock of its own, as a process has
        list(pool.map(add, range(0, 80, 20)))
    assert len(load_records(file, TASK, QARecord)) == 80


def test_tables_and_plots(tmp_path):
    records = [
        record(), record(write_steps=5, f1=0.7), record(memory_tokens=32), record(states=2),
        record(method="full_context", memory_tokens=0, write_steps=0, bytes_per_context=5000.0),
        record(method="no_context", memory_tokens=0, write_steps=0, bytes_per_context=0.0),
        record(dataset="fairytaleqa"),
    ]  # fmt: skip
    console = Console(width=160, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    for table in tables(records):
        console.print(table)
    text = console.export_text()
    assert "GradMem, m=16, K=5" in text
    assert "K=1-5" in text  # trained with
    assert "70.0 ± 10.0" in text
    assert "asked of 2 contexts side by side" in text
    assert "5 x" in text
    files = plot(records, tmp_path)
    assert [file.name for file in files] == ["answers_babi_1.png", "answers_fairytaleqa.png"]
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.fixture
def checkpoint(folder, tmp_path):  # noqa: F811
    """A model by GradMem that is not trained, saved."""
    plan = recipe(folder)
    save_model(*plan.build(), plan, tmp_path / "model")
    return tmp_path / "model"


def test_the_commands(checkpoint, tmp_path):
    results = tmp_path / "answers.json"
    command = ["eval", str(checkpoint), "--steps", "1,2", "--states", "1,2"]
    result = CliRunner().invoke(app, [*command, "--results", str(results), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = load_records(results, TASK, QARecord)
    assert {(r.dataset, r.write_steps, r.states) for r in found} == {
        (name, k, s) for name in ("short", "long") for k in (1, 2) for s in (1, 2)
    }
    result = CliRunner().invoke(app, ["plot", str(results), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "GradMem, m=3, K=2" in result.output
    before = results.read_text()
    result = CliRunner().invoke(app, [*command, "--results", str(results), "--limit", "3", "--device", "cpu"])
    assert result.exit_code == 2
    assert "keeps results on all of the data" in " ".join(result.stderr.split())
    assert results.read_text() == before
    result = CliRunner().invoke(app, [*command, "--limit", "1", "--states", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output
    result = CliRunner().invoke(app, [*command, "--states", "9", "--device", "cpu"])
    assert result.exit_code == 2
    assert "cannot be asked of 9" in " ".join(result.stderr.split())


def test_training_by_the_command(folder, tmp_path):  # noqa: F811
    for name in ("short", "long"):
        (folder / name / "valid.jsonl").write_text((folder / name / "test.jsonl").read_text())
    import yaml

    file = tmp_path / "recipe.yaml"
    fields = {
        "task": "answers", "backbone": str(folder / "backbone"), "method": "mean_pooling", "steps": 2, "tokens": 64,
        "memory": {"num_memory_tokens": 3, "lora_config": {"r": 2, "target_modules": ["q_proj"]}},
        "sources": [{"source": str(folder / "short")}], "buckets": [10], "bf16": False,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(fields))
    result = CliRunner().invoke(app, ["train", str(file), "--output", str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "checkpoint" / "recipe.json").read_text())["method"] == "mean_pooling"
    assert "mean pooling, m=3" in result.output


def test_an_evaluation_that_is_cut_short_keeps_what_it_has_measured(checkpoint, tmp_path, monkeypatch):
    results, whole = tmp_path / "answers.json", qa_results.measure

    def measured(answerer, rows, dataset, **options):
        if dataset == "long":
            raise KeyboardInterrupt
        return whole(answerer, rows, dataset, **options)

    monkeypatch.setattr(qa_results, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        evaluate_answers(checkpoint, [1], [1], device=torch.device("cpu"), results=results)
    assert [r.dataset for r in load_records(results, TASK, QARecord)] == ["short"]


def test_one_source_alone_is_evaluated(checkpoint, tmp_path):
    results = tmp_path / "answers.json"
    command = ["eval", str(checkpoint), "--steps", "1", "--device", "cpu"]
    run = CliRunner().invoke(app, [*command, "--source", "long", "--results", str(results)])
    assert run.exit_code == 0, run.output
    assert [r.dataset for r in load_records(results, TASK, QARecord)] == ["long"]
    for options, message in (
        (["--source", "longer"], "was not trained on longer; its sources are short, long"),
        (["--pairs", "4"], "--pairs is for key-value retrieval alone"),
    ):
        run = CliRunner().invoke(app, [*command, *options])
        assert run.exit_code == 2
        assert message in " ".join(run.output.split())


def test_answers_are_kept_with_their_scores(checkpoint, tmp_path):
    kept = tmp_path / "answers.jsonl"
    command = ["eval", str(checkpoint), "--steps", "1,2", "--source", "short", "--device", "cpu"]
    run = CliRunner().invoke(app, [*command, "--answers", str(kept)])
    assert run.exit_code == 0, run.output
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [line["write_steps"] for line in lines] == [1] * 12 + [2] * 12
    assert [line["query"] for line in lines[:12]] == [line["query"] for line in lines[12:]]
    assert {"dataset", "split", "states", "answer", "accepted", "exact_match", "f1", "rouge_l"} < lines[0].keys()
    run = CliRunner().invoke(app, [*command, "--answers", str(tmp_path / "none" / "answers.jsonl")])
    assert run.exit_code == 2
    assert "There is no directory" in " ".join(run.output.split())


def test_no_write_steps_are_a_number_of_write_steps_in_the_plot(tmp_path, monkeypatch):
    drawn = []
    axes = pyplot().Axes
    monkeypatch.setattr(axes, "errorbar", record_call(drawn, axes.errorbar))
    plot([record(write_steps=k, f1=f1, trained_steps="0-1") for k, f1 in ((0, 0.5), (1, 0.6))], tmp_path)
    assert ([0, 1], [50, 60], "GradMem, m=16, trained with K=0-1") in drawn
    assert ([16], [50], "GradMem, K=0, trained with K=0-1") in drawn
    drawn.clear()
    plot([record(memory_tokens=m, trained_steps=steps) for m, steps in ((16, "1"), (32, "2"))], tmp_path)
    assert [x for x, _, _ in drawn[:2]] == [[16], [32]]  # trained otherwise: no line


def record_call(drawn, function):
    def call(self, x, y, *rest, label, **options):
        drawn.append((x, y, label))
        return function(self, x, y, *rest, label=label, **options)

    return call
