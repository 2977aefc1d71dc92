"""Processes killed while they save: the old or the new file is whole, and the next save removes what they left."""

import json
import os
import signal

import pytest
import torch
from adapters import make
from jobs import save_checkpoints, save_states, train, write, write_lines
from killing import SERVER, kill_often
from tiny import tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import GradMemPipeline, MemoryState, load_checkpoint, save_checkpoint
from gradmem_adapter.store import MemoryStore


def killed_while_saving_states(path, kills):
    for _ in kill_often(save_states, path, kills=kills, longest=0.1):
        state = MemoryState.load(path)
        assert torch.equal(state.vectors, torch.full_like(state.vectors, float(state.context_tokens) - 1))
        assert len(os.listdir(path.parent)) <= 2, "more than the last process left is there"
    state.save(path)
    assert os.listdir(path.parent) == [path.name]


def test_a_kill_leaves_a_whole_state(tmp_path):
    killed_while_saving_states(tmp_path / "state.safetensors", 5)


@pytest.mark.slow
def test_many_kills_leave_a_whole_state(tmp_path):
    killed_while_saving_states(tmp_path / "state.safetensors", 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"lora_config": {"r": 2, "target_modules": ["q_proj"]}}, {"train_backbone": True}],
    ids=["lora", "backbone"],
)
def test_many_kills_leave_a_whole_checkpoint(tmp_path, config):
    path, seen = tmp_path / "saved", set()
    model, backbone = make(**config), None if config.get("train_backbone") else tiny()
    save_checkpoint(model, tiny_tokenizer(), path)
    (path / "notes").write_text("notes")
    for kill in kill_often(save_checkpoints, path, config, kills=100, longest=0.5):
        model, _ = load_checkpoint(path, backbone=backbone and tiny())
        memory = model.base_model.slots.gradmem_memory["default"]
        if kill > 10:  # all files are of one save
            assert len(memory.unique()) == 1
            seen.add(int(memory[0, 0]))
            if config.get("train_backbone"):
                assert (model.get_base_model().lm_head.weight == memory[0, 0]).all()
        assert (path / "notes").read_text() == "notes"
    assert len(seen) > 1
    save_checkpoint(model, tiny_tokenizer(), path)
    assert os.listdir(tmp_path) == ["saved"]
    assert not [name for name in os.listdir(path) if name.startswith(".")]


@pytest.mark.slow
def test_many_kills_of_the_write_command_leave_a_whole_state(folder):
    pipeline = GradMemPipeline(*load_checkpoint(folder / "checkpoint"))
    right = [pipeline.write((folder / f"{i}.txt").read_text()) for i in range(2)]
    before, seen = sorted(os.listdir(folder)), 0
    for _ in kill_often(write, folder, kills=50, longest=2.0):
        if (folder / "states").exists():
            state = MemoryState.load(folder / "states")
            assert any(torch.allclose(state.vectors, one.vectors, atol=1e-5) for one in right)
            seen += 1
    assert seen > 10
    state.save(folder / "states")
    assert sorted(os.listdir(folder)) == sorted([*before, "states"])


def test_writing_json_lines_continues_after_kills(folder):
    """No line is lost or written twice, and at most one batch of work is lost."""
    lines = [tiny_text(18, seed=seed) for seed in range(12)] + [tiny_text(33, seed=99)]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    store, stored, states = MemoryStore(folder / "memory"), 0, {}
    for puts in (3, 1, 0):
        process = SERVER.Process(target=write_lines, args=(folder, puts))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if puts else 0)
        before, states = states, {entry.key: store.get(entry.key) for entry in store.entries()}
        assert len(states) >= stored + 2 * max(puts - 1, 0)
        assert all(torch.equal(states[key].vectors, state.vectors) for key, state in before.items())
        stored = len(states)
    found = {(int(entry.source.split(":")[1]) - 1, entry.start, entry.end): entry.text for entry in store.entries()}
    assert len(found) == stored == 14
    assert all(text == lines[number][start:end] for (number, start, end), text in found.items())
    assert {number for number, _, _ in found} == set(range(13))
    assert sorted(os.listdir(store.path)) == ["index.sqlite", "states"]


@pytest.mark.slow
def test_many_kills_of_the_train_command_leave_whole_checkpoints(folder):
    """Despite many kills the run finishes, and every checkpoint on the way is whole."""
    run, steps = folder / "run", [0]
    for _ in kill_often(train, folder, kills=15, longest=1.0):
        found = [path for path in run.glob("checkpoint-*") if path.is_dir()]
        for path in found:
            load_checkpoint(path)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(path / name, weights_only=False)
            assert json.loads((path / "trainer_state.json").read_text())["global_step"] == int(path.name[11:])
        last = max((int(path.name[11:]) for path in found), default=0)
        assert last >= steps[-1], "no step that was saved is lost"
        assert len(found) <= 3
        steps.append(last)
        if last >= 50:
            break
    assert steps[-1] > 0
    process = SERVER.Process(target=train, args=(print, folder))
    process.start()
    process.join()
    assert process.exitcode == 0
    load_checkpoint(run / "checkpoint")
    assert sorted(os.listdir(run)) == ["checkpoint", "checkpoint-57", "checkpoint-60", "run.json"]
    assert not list(run.rglob(".*"))
