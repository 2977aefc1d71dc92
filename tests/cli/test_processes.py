"""Commands that several processes run together: what they print, and how their connection ends."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from commands import invoke
from tiny import rows, tiny_text

from evaluation.cli import app
from gradmem_adapter.cli.processes import meet

RECIPE = Path(__file__).parents[2] / "evaluation" / "recipes" / "kv_16_pairs.yaml"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("made", ["made/by the run", None])
@pytest.mark.parametrize(
    ("function", "command", "then"),
    [
        ("evaluation.cli.train_run", ["train", RECIPE], "Measure it: python -m evaluation run"),
        (
            "evaluation.questions.cli.train_writer",
            ["questions", "train", "story=x"],
            "Let it write: python -m evaluation questions write",
        ),
    ],
)
def test_the_end_of_a_run_is_announced_once(monkeypatch, function, command, then, made, rank):
    monkeypatch.setattr(PartialState(cpu=True), "process_index", rank)
    monkeypatch.setattr(function, lambda *_: made and Path(made))
    result = invoke(*command, "--output", "run", "--device", "cpu", app=app)
    told = f"Saved: {made}. {then} {made}\n" if made else "Interrupted; the same command continues from run.\n"
    assert (result.stdout, result.exit_code) == ("" if rank else told, 0 if made else 130)


@pytest.fixture
def launched(monkeypatch):
    """This process as torchrun starts it, but without others."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**names, "MASTER_PORT": 0, "OMP_NUM_THREADS": 1}.items():  # port 0: any free one
        monkeypatch.setenv(name, str(value))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def threads_of_gloo():
    """They abort a process that shuts down while they free tensors."""
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def test_write_ends_its_connection(launched, checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text(tiny_text(12))
    arguments = ("--store", tmp_path / "memory", "--segment-tokens", 8, "--device", "cpu")
    result = invoke("write", tmp_path / "a.txt", *arguments, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert PartialState().backend == "gloo"
    assert not torch.distributed.is_initialized()
    assert not threads_of_gloo()


def test_train_ends_its_connection(launched, backbone, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4, 8)))
    settings = ("training.max_steps=1", "memory.num_memory_tokens=2", "memory.lora_config.r=2")
    arguments = [part for one in settings for part in ("--set", one)]
    arguments += ["--backbone", backbone, "--output", tmp_path / "run", "--device", "cpu"]
    result = invoke("train", tmp_path / "rows.jsonl", *arguments)
    assert result.exit_code == 0, result.stderr
    assert PartialState().backend == "gloo"
    assert not torch.distributed.is_initialized()
    assert not threads_of_gloo()


def test_a_connection_that_a_reducer_in_a_cycle_holds_is_ended(launched):
    with meet(cpu=True):
        reduced = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
        reduced(torch.ones(2, 3)).sum().backward()
        reduced.cycle = [reduced]
        del reduced
    assert not threads_of_gloo()


def test_the_connection_stays_after_an_error(launched):
    """To end it could wait forever for what another process never sends."""
    with pytest.raises(ValueError, match="failed"), meet(cpu=True):
        raise ValueError("failed")
    assert torch.distributed.is_initialized()


def test_the_connection_of_the_caller_stays(launched):
    with meet(cpu=True):
        with meet(cpu=True):
            pass
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
