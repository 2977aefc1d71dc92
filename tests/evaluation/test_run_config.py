"""Configurations of runs: YAML, settings, shipped recipes, and what is refused."""

from pathlib import Path

import pytest
import yaml
from small_runs import kv_fields, qa_fields
from tiny import rows, tiny_tokenizer

from evaluation.config import RunConfig, task_of
from evaluation.models import load_config
from evaluation.tasks import Babi
from gradmem_adapter.backbones import SMOLLM2
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.training import GradMemCollator, RowBatches

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "evaluation" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid(path):
    config = RunConfig.load(path)
    GradMemConfig(**config.memory)
    if config.backbone == SMOLLM2:
        RowBatches(rows(2, 30), GradMemCollator(tiny_tokenizer()), **config.batches)  # options that fit together
    assert path.stem.startswith("untouched") or config.training["cuda_graphs"]
    assert config.evaluation.tasks or any(task.measured for task in config.tasks)


@pytest.mark.parametrize(
    ("checkpoint", "recipe"),
    [
        ("kv-retrieval", "kv_retrieval_longer"),
        ("smollm2-135m-qa", "qa_general_removed_from_articles"),
        ("smollm2-135m-qa-128", "qa_general_128_removed_from_articles"),
        ("smollm2-135m-babi", "qa_babi_all_questions"),
    ],
)
def test_the_shipped_weights_were_trained_by_the_shipped_recipes(checkpoint, recipe):
    made, ships = (
        load_config(ROOT / "checkpoints" / checkpoint),
        RunConfig.load(ROOT / f"evaluation/recipes/{recipe}.yaml"),
    )
    fields, shipped = made.fields(), ships.fields()
    for each in (fields, shipped):
        each["training"].pop("max_minutes", None)  # the clock ended it after the recipe's steps
        each.pop("trained_minutes", None)
    assert RunConfig.of(fields) == RunConfig.of(shipped)


def test_a_recipe_can_extend_another(tmp_path):
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(kv_fields()), encoding="utf-8")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nmemory: {num_memory_tokens: 2}", encoding="utf-8")
    (tmp_path / "third.yaml").write_text("base: second.yaml\ntraining: {seed: 7}", encoding="utf-8")
    fields = kv_fields()
    fields["memory"]["num_memory_tokens"], fields["training"]["seed"] = 2, 8
    assert RunConfig.load(tmp_path / "third.yaml", ["training.seed=8"]) == RunConfig.of(fields)
    (tmp_path / "lost.yaml").write_text("base: nowhere.yaml", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RunConfig.load(tmp_path / "lost.yaml")


def test_settings_override_fields(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(kv_fields()), encoding="utf-8")
    settings = ["training.seed=3", "memory.num_memory_tokens=2", "method={name: full_context}", "tasks.0.pairs=5"]
    config = RunConfig.load(path, settings)
    assert (config.training["seed"], config.memory["num_memory_tokens"]) == (3, 2)
    assert (config.method.name, config.tasks[0].pairs) == ("full_context", 5)
    for setting, message in (
        ("seed", "field=value"), ("=1", "field=value"), ("init_from.x.y=1", "has no fields"),
        ("tasks=[", "cannot be read as YAML"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            RunConfig.load(path, ["init_from=a", setting])
    path.write_text("- a list", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a mapping"):
        RunConfig.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "magic"}}, "name of a method must be one of extractive, forward_memory, .*got 'magic'"),
        ({"method": {"name": "full_context", "dtype": "bfloat16"}}, "dtype"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"name": "passages"}]}, "source"),
        ({"tasks": [{"name": "riddles"}]}, "name of a task must be one of answerable, babi"),
        ({"tasks": [{"name": "babi", "source": "x", "number": 4, "every_question": True}]}, "got 4"),
        ({"stepz": 3}, "stepz"),
        ({"memory": {"slots": 3}}, "memory has no field slots"),
        ({"batches": {"bucket": [3]}}, "batches has no field bucket"),
        ({"training": {"lr": 3}}, "training has no field lr"),
        ({"training": {"write_steps": [0, 1]}}, "with which memory knows nothing of the context"),
        ({"evaluation": {"write_steps": [-1]}}, "write_steps"),
    ],
)
def test_invalid_configurations_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.of(qa_fields(tmp_path) | change)


def test_zero_write_steps_can_be_trained_if_memory_starts_from_the_context(tmp_path):
    fields = qa_fields(tmp_path)
    fields["training"]["write_steps"], fields["memory"]["start"] = [0, 0, 1], "context"
    assert RunConfig.of(fields).write_steps == (0, 1)


def test_write_steps_lists_the_trained_numbers(tmp_path):
    assert RunConfig.of(kv_fields()).write_steps == (1, 2)
    assert RunConfig.of(kv_fields(training={"write_steps": [5]})).write_steps == (5,)
    assert RunConfig.of(kv_fields({"name": "full_context"})).write_steps == ()


def test_a_task_can_be_written_on_one_line():
    assert task_of("{name: babi, source: data, number: 2}") == Babi(source="data", number=2)
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        task_of("{name: ")
