"""The evaluator: what it measures, records and keeps."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from small_runs import METHODS, kv_fields, qa_config, qa_fields, write_folder
from tiny import tiny_tokenizer
from typer.testing import CliRunner

from evaluation.cli import app
from evaluation.config import Evaluation
from evaluation.data import questions
from evaluation.methods import GradMem
from evaluation.models import build_model, save_model
from evaluation.results import Record, add_records, frame, load_records
from evaluation.run import Answerer, evaluate
from evaluation.tasks import Passages
from evaluation.train import train, training_batches
from evaluation.unanswerable import REFUSAL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("qa"))


@pytest.fixture
def checkpoint(folder, tmp_path):
    """A saved, untrained GradMem model."""
    config = qa_config(folder)
    save_model(*build_model(config), config, tmp_path / "model")
    return tmp_path / "model"


def invoke_plain(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def invoke(*arguments):
    return invoke_plain(*arguments, "--device", "cpu")


class Fixed(Answerer):
    """Gives known answers."""

    asked = []

    def answer(self, contexts, queries, reads, max_new_tokens=32):
        self.asked.append(reads)
        return ["nothing" if i % 3 else row[0] for i, row in enumerate(questions(Fixed.rows)[3])]


def test_answers_are_scored_and_recorded(folder):
    config = qa_config(folder)
    Fixed.rows = config.tasks[0].rows("test")
    answerer = Fixed(*build_model(config), config, 2)
    found = config.tasks[0].measure(answerer, "test", states=3, seed=1)
    hits = [1.0 if i % 3 == 0 else 0.0 for i in range(12)]
    assert found.values["exact_match"].tolist() == found.values["f1"].tolist() == hits
    assert found.facts == {"context_tokens": 9}
    assert [line["exact_match"] for line in found.answers] == hits
    assert [line["accepted"] for line in found.answers] == questions(Fixed.rows)[3]
    assert all(i in reads for i, reads in zip(questions(Fixed.rows)[2], answerer.asked[-1], strict=True))


def test_refusals_are_measured(folder):
    """Questions about the wrong passage are counted separately."""
    config = qa_config(folder)
    task = dataclasses.replace(config.tasks[0], unanswerable=0.5)
    accepted = questions(task.rows("test"))[3]
    wrong = [row == [REFUSAL] for row in accepted]
    assert sum(wrong) == 12

    class Refusing(Answerer):
        def answer(self, *args, **kwargs):
            return [REFUSAL.title() + "." if i % 2 else row[0] for i, row in enumerate(accepted)]

    found = task.measure(Refusing(*build_model(config), config, 2), "test").values
    assert found["right_refusals"].tolist() == [1.0] * sum(wrong)
    assert found["false_refusals"].tolist() == [float(i % 2) for i, other in enumerate(wrong) if not other]
    assert found["exact_match"].tolist() == [float(not i % 2) for i, other in enumerate(wrong) if not other]
    assert (task.settings, config.tasks[0].settings) == ({"unanswerable": 0.5}, {})


@pytest.mark.parametrize("kept", ["float32", "int8"])
def test_states_can_be_read_as_a_store_keeps_them(folder, kept):
    config = qa_config(folder)
    task, asked = dataclasses.replace(config.tasks[0], kept=kept), []

    class Asked(Answerer):
        def ask(self, memory, lengths, queries, *args):
            asked.append(memory.vectors)
            return [""] * len(queries)

    found = task.measure(Asked(*build_model(config), config, 1), "test")
    assert found.settings == {} != task.settings == {"kept": kept}
    steps = 127 * asked[0] / asked[0].abs().amax(-1, keepdim=True)
    assert torch.allclose(steps, steps.round(), atol=1e-3) == (kept == "int8")


def test_contexts_are_written_once_for_all_numbers_of_states(checkpoint, folder, monkeypatch):
    read, written = GradMem.read, []

    def counted(self, model, tokenizer, contexts, steps):
        written.append((steps, len(contexts)))
        return read(self, model, tokenizer, contexts, steps)

    monkeypatch.setattr(GradMem, "read", counted)
    asked = Evaluation(tasks=(Passages(source=str(folder / "short")),), write_steps=(0, 1), states=(1, 2, 3))
    records = evaluate(checkpoint, device=CPU, evaluation=asked)
    assert [(record.write_steps, record.states) for record in records] == [(k, s) for k in (0, 1) for s in (1, 2, 3)]
    contexts = len(Passages(source=str(folder / "short")).rows("test"))
    assert written == [(0, contexts), (1, contexts)]


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method["name"])
def test_a_record_describes_its_measurement(folder, tmp_path, method):
    config = qa_config(folder, method)
    save_model(*build_model(config), config, tmp_path / "model")
    short = Evaluation(tasks=(Passages(source=str(folder / "short")),), write_steps=(1, 2))
    records = evaluate(tmp_path / "model", device=CPU, evaluation=short)
    steps = [1, 2] if method["name"] == "forward_memory" else [0]
    assert [record.write_steps for record in records] == steps
    record = records[0]
    assert (record.task, record.dataset, record.method, record.n) == ("passages", "short", method["name"], 12)
    assert record.trained_steps == ("1-2" if method["name"] == "forward_memory" else "")
    assert record.memory_tokens == (0 if method["name"] == "full_context" else method.get("tokens", 3))
    mean = record.metrics["exact_match"]
    assert record.errors["exact_match"] == pytest.approx(math.sqrt(mean * (1 - mean) / 11))
    assert record.facts["full_bytes"] == 9 * 4 * 2 * 2 * 2 * 8


def test_records_are_replaced_by_key(tmp_path):
    file = tmp_path / "new" / "results.jsonl"

    def record(**fields):
        return Record(**{"task": "babi", "method": "gradmem", "write_steps": 2, "metrics": {"f1": 0.6}} | fields)

    add_records(file, [record(), record(write_steps=5)])
    add_records(file, [record(metrics={"f1": 0.9}, device="other")])
    assert {r.write_steps: r.metrics["f1"] for r in load_records(file)} == {2: 0.9, 5: 0.6}
    add_records(file, [record(split="valid"), record(trained_steps="2"), record(settings={"pairs": 4})])
    assert len(load_records(file)) == 5
    assert frame(load_records(file))["pairs"].dropna().tolist() == [4]
    file.write_text('{"task": "babi", "method": "gradmem", "dataset": "one\u2028line"}\n', encoding="utf-8")
    assert load_records(file)[0].dataset == "one\u2028line"
    file.write_text('\n{"x": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is not a record"):
        load_records(file)


def test_records_of_several_processes_are_all_kept(tmp_path):
    file = tmp_path / "results.jsonl"

    def add(first):
        for k in range(first, first + 10):
            add_records(file, [Record(task="babi", method="gradmem", write_steps=k)])

    with ThreadPoolExecutor(4) as pool:  # each has its own lock, as a process has
        list(pool.map(add, range(0, 40, 10)))
    assert len(load_records(file)) == 40


def test_run_records_every_data_set_and_setting(checkpoint, tmp_path):
    results = tmp_path / "answers.jsonl"
    command = ["run", checkpoint, "--steps", "1,2", "--states", "1,2"]
    result = invoke(*command, "--results", results)
    assert result.exit_code == 0, result.output
    assert {(r.dataset, r.write_steps, r.states) for r in load_records(results)} == {
        (name, k, s) for name in ("short", "long") for k in (1, 2) for s in (1, 2)
    }
    assert "| short | GradMem | 2 | 3 | 1 |" in result.output
    before = load_records(results)
    result = invoke(*command, "--results", results, "--limit", "3")
    assert result.exit_code == 0, result.output
    whole, part = load_records(results)[: len(before)], load_records(results)[len(before) :]
    assert whole == before  # a part of the data does not replace the whole
    assert len(part) == len(before)
    assert {record.settings["limit"] for record in part} == {3}
    result = invoke(*command, "--limit", "1", "--states", "1")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output
    result = invoke(*command, "--states", "9")
    assert result.exit_code == 2
    assert "questions are asked of 9" in " ".join(result.stderr.split())


def test_train_follows_a_recipe_and_its_settings(folder, tmp_path):

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(qa_fields(folder)), encoding="utf-8")
    result = invoke("train", recipe, "--output", tmp_path / "run", "--set", "method={name: mean_pooling}",
                    "--set", "training.max_steps=2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"python -m evaluation run {tmp_path / 'run' / 'checkpoint'}" in result.output
    made = json.loads((tmp_path / "run" / "checkpoint" / "recipe.json").read_text())
    assert (made["method"]["name"], made["training"]["max_steps"]) == ("mean_pooling", 2)
    result = invoke("train", recipe, "--output", tmp_path / "run", "--set", "training.max_steps=3")
    assert result.exit_code == 2
    assert "another configuration: method, training differ" in " ".join(result.stderr.split())


def test_rows_are_tokenized_once_for_several_runs(folder, tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(qa_fields(folder)))
    result = invoke_plain("tokenize", recipe, "--output", tmp_path / "tokens")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == ["6 contexts of up to 10 tokens", "4 contexts of up to 16 tokens"]
    config = qa_config(folder, tokenized=str(tmp_path / "tokens"))
    kept, anew = (training_batches(c, tiny_tokenizer()).batch(3, CPU) for c in (config, qa_config(folder)))
    assert all(torch.equal(torch.as_tensor(kept[name]), torch.as_tensor(anew[name])) for name in anew)
    recipe.write_text(yaml.safe_dump(kv_fields()))
    assert "nothing to tokenize" in invoke_plain("tokenize", recipe, "--output", tmp_path / "tokens").stderr


def test_training_that_diverges_ends_with_status_1(folder, tmp_path, monkeypatch):
    from gradmem_adapter.training import TrainingDiverged

    def diverge(*args):
        raise TrainingDiverged("The loss is not finite in step 3.")

    monkeypatch.setattr("evaluation.cli.train_run", diverge)
    (tmp_path / "r.yaml").write_text("tasks: [{name: kv_retrieval}]\nbackbone: {}\n")
    result = invoke("train", tmp_path / "r.yaml", "--output", tmp_path / "run")
    assert (result.exit_code, "not finite in step 3" in result.stderr) == (1, True)


def test_an_interrupted_evaluation_keeps_what_it_has_measured(checkpoint, tmp_path, monkeypatch):
    results, whole = tmp_path / "answers.jsonl", Passages.measure

    def measured(self, *args, **options):
        if self.dataset == "long":
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    monkeypatch.setattr(Passages, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, device=CPU, results=results)
    assert {r.dataset for r in load_records(results)} == {"short"}


def test_a_single_data_set_can_be_measured(checkpoint, tmp_path):
    results = tmp_path / "answers.jsonl"
    run = invoke("run", checkpoint, "--steps", "1", "--only", "long", "--results", results)
    assert run.exit_code == 0, run.output
    assert [r.dataset for r in load_records(results)] == ["long"]
    run = invoke("run", checkpoint, "--only", "longer")
    assert run.exit_code == 2
    assert "no data set longer; there are short, long" in " ".join(run.output.split())


def test_answers_are_kept_with_their_scores(checkpoint, tmp_path):
    kept = tmp_path / "answers.jsonl"
    run = invoke("run", checkpoint, "--steps", "1,2", "--only", "short", "--answers", kept)
    assert run.exit_code == 0, run.output
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [line["write_steps"] for line in lines] == [1] * 12 + [2] * 12
    assert [line["query"] for line in lines[:12]] == [line["query"] for line in lines[12:]]
    assert {"dataset", "split", "states", "answer", "accepted", "exact_match", "f1", "rouge_l"} < lines[0].keys()
    run = invoke("run", checkpoint, "--answers", tmp_path / "none" / "answers.jsonl")
    assert run.exit_code == 2
    assert "There is no directory" in " ".join(run.output.split())


def test_a_text_can_be_measured_whatever_was_trained(checkpoint, tmp_path):
    from tiny import tiny_text

    (tmp_path / "t.txt").write_text(tiny_text(20))
    for options in (["--text", tmp_path / "t.txt"], ["--task", f"{{name: reconstruction, text: {tmp_path}/t.txt}}"]):
        run = invoke("run", checkpoint, *options)
        assert run.exit_code == 2
        assert "The text has 20 tokens, enough for 0 passages of 128, not for 64." in " ".join(run.stderr.split())
    task = f"{{name: reconstruction, text: {tmp_path}/t.txt, tokens: 5, passages: 3}}"
    run = invoke("run", checkpoint, "--task", task, "--steps", "1", "--results", tmp_path / "r.jsonl")
    assert run.exit_code == 0, run.output
    (record,) = load_records(tmp_path / "r.jsonl")
    assert (record.task, record.settings["checkpoint"], record.n) == ("reconstruction", "model", 3)


def test_checkpoints_are_distinguished_by_the_names_of_their_runs(folder, tmp_path):
    checkpoint = train(qa_config(folder, {"name": "gradmem"}, training={"max_steps": 1, "disable_tqdm": True}),
                       tmp_path / "one", CPU)  # fmt: skip
    (tmp_path / "t.txt").write_text("w1 " * 20)
    task = f"{{name: reconstruction, text: {tmp_path}/t.txt, tokens: 5, passages: 1}}"
    assert invoke("run", checkpoint, "--task", task, "--results", tmp_path / "r.jsonl").exit_code == 0
    assert load_records(tmp_path / "r.jsonl")[0].settings["checkpoint"] == "one/checkpoint"
