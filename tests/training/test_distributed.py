"""Two processes that share the work give the same as one: gradients, logs, evaluation, checkpoints."""

import json

import distributed_run
import pytest
import torch
import two_processes
from test_trainer import close, make, same
from test_trainer import weights as trained
from tiny import tiny, tiny_text, tiny_tokenizer, write_tiny_gguf
from transformers import AutoModelForCausalLM

from gradmem_adapter import load_checkpoint, save_checkpoint
from gradmem_adapter.store import MemoryStore

META_GRADIENTS = ("exact", "finite_difference", "first_order")
A_STEP = 1e-2
"""How far an optimizer step goes at the tests' learning rate. Adam takes full ones even along rounding errors."""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes saw, and the folder they wrote into; one start for all, because starting takes seconds."""
    folder = tmp_path_factory.mktemp("two")
    save_checkpoint(make(train_backbone=True), tiny_tokenizer(), folder / "checkpoint")
    (folder / "texts").mkdir()
    for i in range(5):
        (folder / "texts" / f"{i}.txt").write_text(tiny_text(10 + 10 * i, seed=i))
    (folder / "texts" / "latin.txt").write_bytes(b"w1 \xe4")
    (folder / "texts" / "picture").write_bytes(bytes(99))
    (folder / "holds_a_gguf").mkdir()
    (folder / "holds_a_gguf" / "__init__.py").touch()
    write_tiny_gguf(folder / "holds_a_gguf" / "tiny.gguf")
    results, _ = two_processes.start("training/distributed_run.py", ",".join(META_GRADIENTS), folder, folder=folder)
    return results, folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process gives, by meta-gradient."""
    return {name: distributed_run.train(tmp_path_factory.mktemp("one"), 1, name) for name in META_GRADIENTS}


@pytest.mark.parametrize("run", [*META_GRADIENTS, "sharded exact", "sharded finite_difference"])
def test_two_processes_give_the_same_as_one(two, one, run):
    meta_gradient = run.removeprefix("sharded ")
    (results, folder), one = two, one[meta_gradient]
    for result in (result[run] for result in results):
        for shared, alone in zip(result["gradients"], one["gradients"], strict=True):
            close(shared, alone, atol=1e-5 if meta_gradient == "finite_difference" else 1e-6)
        for name, values in one["logs"].items():
            assert result["logs"][name] == pytest.approx(values, rel=1e-4), name
        for name, value in one["metrics"].items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4), name
        assert result["trained_length"] == one["trained_length"]
        assert all(map(torch.equal, result["answers"], one["answers"]))
    assert one["metrics"]["eval_exact_match"] > 0 or meta_gradient == "exact"
    weights = results[0][run]["weights"]
    close(weights, one["weights"], atol=A_STEP / 100)
    assert same(weights, results[1][run]["weights"])
    assert same(weights, results[0][run]["resumed"])
    own = None if meta_gradient == "exact" else tiny()
    model, _ = load_checkpoint(folder / run / "checkpoint-2", backbone=own, is_trainable=True)
    assert same(weights, trained(model))


def test_two_processes_write_each_document_once(two):
    results, folder = two
    first, second = (result["written"] for result in results)
    assert (first["exit_code"], second) == (2, {"stdout": "", "stderr": "", "exit_code": 0})
    figures, store = json.loads(first["stdout"]), MemoryStore(folder / "memory")
    assert (figures["documents"], figures["tokens"]) == (5, 155)  # 150 of them by themselves, and an overlap
    assert figures["segments"] == figures["written"] == len(store) == 10
    assert len(figures["refused"]) == len(figures["passed_over"]) == 1
    found = {int(entry.source[-5]) for entry in store.entries()}
    assert found == set(range(5))
    assert store.verify().ok


def test_every_process_saves_a_complete_checkpoint(two):
    """Not only the first, as in Transformers: another one may have to unpack a backbone for all."""
    results, folder = two
    assert same(results[0]["unpacked"], results[1]["unpacked"])
    (cached,) = (folder / "cache").iterdir()
    assert same(AutoModelForCausalLM.from_pretrained(cached).state_dict(), results[0]["unpacked"])
    own = [trained(load_checkpoint(folder / f"of process {rank}", is_trainable=True)[0]) for rank in range(2)]
    assert same(*own)


@pytest.mark.parametrize(
    ("number", "what"),
    list(enumerate(["version 1", "activation_checkpointing", "cpu_offload", "muon_lr_factor", "cuda_graphs"])),
)
def test_unsupported_options_are_refused_with_sharded_weights(two, number, what):
    assert all(what in result["refused"][number] for result in two[0])


def test_two_processes_share_ready_batches(two, tmp_path):
    results, _ = two
    one = distributed_run.train_ready(tmp_path, 1)
    assert set(one["logs"]["write_steps"]) == {1, 2}
    for result in (result["ready"] for result in results):
        for shared, alone in zip(result["gradients"], one["gradients"], strict=True):
            close(shared, alone)
        close(result["weights"], one["weights"], atol=A_STEP / 100)
        for name, values in one["logs"].items():
            assert result["logs"][name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("why", ["interrupted", "clock"])
def test_both_processes_end_at_the_same_step(two, why):
    """After a signal to one of them, or by the clock of the first."""
    first, second = (result[why] for result in two[0])
    assert first["step"] == second["step"]
    assert first["seen"] is second["seen"] is (why == "interrupted")
    assert first["saved"] or why == "clock"
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert first["step"] == 3 or why == "clock"


def test_both_processes_stop_if_one_diverges(two):
    for result in two[0]:
        assert result["diverged"].startswith("The loss is not finite in step 2.")
