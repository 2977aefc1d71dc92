"""`gradmem train` and `gradmem eval` on a file of rows."""

import gzip
import json

import pytest
import yaml
from tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner

from gradmem_adapter import load_checkpoint
from gradmem_adapter.cli import app
from gradmem_adapter.recipes import load_recipe
from gradmem_adapter.training import read_rows

ROWS = [
    {"context": f"w{i} w{i + 1} w{i + 2}", "queries": [f"w{i}", f"w{i + 1}"], "targets": [f"w{i + 1}", f"w{i + 2}"]}
    for i in range(12)
]


@pytest.fixture
def files(tmp_path):
    tiny(num_hidden_layers=1).save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:8]), encoding="utf-8")
    with gzip.open(tmp_path / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS[8:]))
    recipe = {
        "task": "rows",
        "backbone": str(tmp_path / "backbone"),
        "train": str(tmp_path / "train.jsonl"),
        "evaluate": str(tmp_path / "test.jsonl.gz"),
        "memory": {
            "num_memory_tokens": 2, "write_steps": 1, "meta_gradient": "finite_difference",
            "lora_config": {"r": 2, "target_modules": ["q_proj"]},
        },
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def test_train_then_eval(files):
    result = invoke("train", files / "recipe.yaml", "--output", files / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "exact match" in result.output
    load_checkpoint(files / "run" / "checkpoint")
    result = invoke(
        "eval", files / "run" / "checkpoint", "--rows", files / "test.jsonl.gz", "--steps", "1,3", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "last write loss" in " ".join(result.output.split())


def test_a_stopped_run_goes_on(files):
    arguments = ("train", files / "recipe.yaml", "--output", files / "run", "--device", "cpu")
    result = invoke(*arguments, "--max-minutes", "1e-9")
    assert result.exit_code == 0, result.output
    assert "the same command goes on" in " ".join(result.output.split())
    assert [path.name for path in (files / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    state = json.loads((files / "run" / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


def test_settings_alone_are_a_recipe(files):
    plan = load_recipe(
        None, ["task=rows", f"backbone={files / 'backbone'}", f"train={files / 'train.jsonl'}", "training.max_steps=2"]
    )
    assert plan.training == {"max_steps": 2}
    assert plan.trainer(files / "run", cpu=True).args.max_steps == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train=nowhere.jsonl", "no file of rows 'nowhere.jsonl'"),
        ("colour=red", "colour"),
        ("memory.write_steps=-1", "write_steps must be at least 0"),
        ("training.write_steps=[]", "write_steps must be a list"),
        ("memory.num_memory_token=3", "memory has no field num_memory_token"),
        ("memory={", "is not YAML"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(files, setting, message):
    result = invoke("train", files / "recipe.yaml", "--output", files / "run", "--device", "cpu", "--set", setting)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"context": "a", "query": "b", "target": "c"}\nnot json', "line 2 is not JSON"),
        ("[1]", "line 1 must be an object"),
        ('{"context": "a", "query": "b", "target": ""}', "line 1 has an empty target"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(file)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b'{"context": "a"}' * 99)[:-20], b"{}", b"\x1f\x8b\x08"],
    ids=["cut off", "not gzipped", "a header alone"],
)
def test_damaged_files_are_named(tmp_path, content):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged"):
        read_rows(file)


def test_line_separators_in_a_text_end_no_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"context": "one\u2028two\x85three", "query": "a", "target": "b"}
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read_rows(file) == [row]
