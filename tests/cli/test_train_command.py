"""`gradmem train` on a file of rows: an adapter that opens, runs that continue, and what cannot be trained."""

import gzip
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from commands import invoke
from huggingface_hub import ModelCard
from tiny import tiny, tiny_tokenizer
from transformers import TrainerCallback

from gradmem_adapter import Card, load_checkpoint, save_checkpoint
from gradmem_adapter.cli.train_config import MEMORY, TrainConfig
from gradmem_adapter.training import GradMemTrainer, read_rows
from gradmem_adapter.utils.fields import read_fields

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [
    {"context": f"w{i} w{i + 1} w{i + 2}", "queries": [f"w{i}", f"w{i + 1}"], "targets": [f"w{i + 1}", f"w{i + 2}"]}
    for i in range(12)
]
CONFIG = {
    "memory": {"num_memory_tokens": 2, "lora_config": {"r": 2, "target_modules": ["q_proj"]}},
    "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1},
}


@pytest.fixture
def files(tmp_path):
    tiny(num_hidden_layers=1).save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:8]), encoding="utf-8")
    with gzip.open(tmp_path / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS[8:]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return tmp_path


def train(files, *more):
    return invoke(
        "train", files / "train.jsonl", "--output", files / "run", "--backbone", files / "backbone", "--config",
        files / "config.yaml", "--device", "cpu", *more,
    )  # fmt: skip


def test_training_makes_an_adapter_that_opens(files):
    result = train(files, "--eval", files / "test.jsonl.gz")
    assert result.exit_code == 0, result.output
    assert "exact match" in result.output
    again = train(files, "--eval", files / "test.jsonl.gz", "--json")
    printed = json.loads(again.stdout)
    assert printed["checkpoint"] == str(files / "run" / "checkpoint")
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= printed["metrics"].keys()
    card = (files / "run" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert f"| f1 | {printed['metrics']['eval_f1']:.4g} |" in card
    assert "The rows of `train.jsonl`." in card
    model, _ = load_checkpoint(files / "run" / "checkpoint")
    config = model.active_peft_config
    assert (config.num_memory_tokens, config.start, config.query_format) == (2, "pooled_context", "chat")
    assert config.trained_length == 3
    lora = config.lora_config
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (2, 32, {"q_proj"}), "what is not given is the default"


def test_a_short_run_is_logged(files):
    """Even one with fewer steps than there are between two lines of the log."""
    result = train(files, "--set", "training.logging_steps=20", "--set", "training.max_steps=1")
    assert result.exit_code == 0, result.output
    assert "'target_loss'" in result.output


def test_the_trained_length_counts_contexts_that_were_trained(files):
    """Not one that its steps did not reach."""
    (files / "train.jsonl").write_text(
        "\n".join(json.dumps(row) for row in [*ROWS[:8], ROWS[8] | {"context": "w1 w2 w3 w4 w5"}]), encoding="utf-8"
    )
    once = ("--set", "training.per_device_train_batch_size=1", "--set", "training.max_steps=1")
    assert train(files, *once).exit_code == 0
    assert load_checkpoint(files / "run" / "checkpoint")[0].active_peft_config.trained_length == 3
    assert train(files, *once[:-1], "training.max_steps=9").exit_code == 0
    assert load_checkpoint(files / "run" / "checkpoint")[0].active_peft_config.trained_length == 5


def test_one_lora_setting_keeps_the_other_defaults():
    plan = TrainConfig.of(read_fields(None, ["rows=a", "memory.lora_config.r=8"]))
    assert plan.memory_fields["lora_config"] == {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
    assert MEMORY["lora_config"]["r"] == 16
    plan = TrainConfig.of(read_fields(None, ["rows=a", "memory.lora_config=null"]))
    assert plan.memory_fields["lora_config"] is None


def test_training_with_the_defaults(files):
    """Also with those for a GPU, whose steps are not captured on a CPU."""
    (files / "config.yaml").write_text("training: {max_steps: 2, cuda_graphs: true, bf16: true}", encoding="utf-8")
    result = train(files)
    assert result.exit_code == 0, result.output
    state = json.loads((files / "run" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2


class Interrupt(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_can_be_continued(files, monkeypatch):
    with monkeypatch.context() as patch:
        original = TrainConfig.trainer

        def interrupted(*arguments):
            made = original(*arguments)
            made.add_callback(Interrupt())
            return made

        patch.setattr(TrainConfig, "trainer", interrupted)
        result = train(files)
    assert result.exit_code == 130, result.output
    assert "the same command continues" in " ".join(result.output.split())
    assert [path.name for path in (files / "run").glob("checkpoint*")] == ["checkpoint-1"]
    result = train(files)
    assert result.exit_code == 0, result.output
    state = json.loads((files / "run" / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


def test_a_finished_run_can_be_extended(files):
    assert train(files).exit_code == 0
    result = train(files, "--set", "training.max_steps=6")
    assert result.exit_code == 0, result.output
    state = json.loads((files / "run" / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert json.loads((files / "run" / "run.json").read_text())["training"]["max_steps"] == 6
    result = train(files, "--set", "training.max_steps=6", "--set", "training.learning_rate=1e-4")
    assert result.exit_code == 2
    assert "another configuration: training differs" in " ".join(result.stderr.split())


def test_a_trained_adapter_can_be_trained_further(files):
    """It keeps its weights and memory settings, but not its calibration."""
    assert train(files).exit_code == 0
    first = files / "run" / "checkpoint"
    model, tokenizer = load_checkpoint(first)
    model.active_peft_config.score_calibration = [1.0, 0.5]
    save_checkpoint(model, tokenizer, files / "start", card=Card(license="cc-by-sa-4.0"))
    config = {"checkpoint": str(files / "start"), "training": CONFIG["training"] | {"learning_rate": 1e-12}}
    (files / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ("train", files / "train.jsonl", "--output", files / "more", "--config", files / "config.yaml")
    result = invoke(*command, "--device", "cpu")
    assert result.exit_code == 0, result.output
    further, _ = load_checkpoint(files / "more" / "checkpoint")
    assert further.active_peft_config.score_calibration is None
    assert further.active_peft_config.num_memory_tokens == 2
    card = ModelCard.load(files / "more" / "checkpoint" / "README.md")
    assert "| Started from | `start` (licence: cc-by-sa-4.0) |" in card.text
    assert "The licence of `start`, from which training started, applies (cc-by-sa-4.0)" in card.text
    assert str(files) not in card.content
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert torch.allclose(further.write(**tokens).vectors, model.write(**tokens).vectors, atol=1e-5)
    result = invoke(*command[:-2], "--checkpoint", files / "start", "--set", "memory.num_memory_tokens=3")
    assert result.exit_code == 2
    assert "memory is for a new adapter" in " ".join(result.stderr.split())


def test_the_example_rows_and_settings_are_valid(files):
    """The files beside the example programs, to start from."""
    plan = TrainConfig.of(read_fields(EXAMPLES / "rows.yaml", [f"rows={EXAMPLES / 'rows.jsonl'}"]))
    assert plan.checkpoint == "smollm2-135m-qa"
    assert plan.check(files, torch.device("cpu")).max_steps > 0
    assert len(read_rows(plan.rows)) == 20


def test_a_directory_with_another_run_is_refused(files):
    assert train(files).exit_code == 0
    result = train(files, "--set", "memory.num_memory_tokens=3")
    assert result.exit_code == 2
    assert "holds a run with another configuration: memory differs" in " ".join(result.stderr.split())


def test_a_diverging_run_gives_status_1(files, monkeypatch):
    monkeypatch.setattr(GradMemTrainer, "check_finite", lambda self: self._diverged("The loss is not finite"))
    result = train(files)
    assert result.exit_code == 1
    assert "no checkpoint yet" in " ".join(result.stderr.split())


def test_an_unknown_checkpoint_is_refused(files):
    result = invoke("train", files / "train.jsonl", "--output", files / "run", "--checkpoint", "typo")
    assert result.exit_code == 2, result.output
    assert "There is no checkpoint 'typo': it is not a directory, not a shipped checkpoint (kv-" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("eval_rows=nowhere.jsonl", "no file of rows 'nowhere.jsonl'"),
        ("colour=red", "There is no field colour"),
        ("max_steps=3", "There is no field max_steps. Did you mean training.max_steps? The fields are rows, "),
        ("memory=3", "memory must be a mapping"),
        ("memory.write_steps=-1", "write_steps must be at least 0"),
        ("training.write_steps=[]", "write_steps must be a list"),
        ("training.step=1", "training has no field step. Did you mean max_steps? Some of its fields: "),
        ("training.step=1", "max_steps, muon_lr_factor"),
        ("memory.num_memory_token=3", "memory has no field num_memory_token. Did you mean num_memory_tokens? Some"),
        ("memory.num_memory_token=3", "start, train_backbone, trained_length, write_clip_norm"),
        ("memory={", "cannot be read as YAML"),
        ("memory", "must have the form field=value"),
        ("rows.first=3", "'rows' is a single value and has no fields"),
    ],
)
def test_invalid_settings_are_refused(files, setting, message):
    more = ["--set", setting] if setting != "rows.first=3" else ["--set", "rows=a", "--set", setting]
    result = train(files, *more)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert setting.startswith("eval_rows") or not (files / "run").exists(), "it would stand in the way of a good run"
