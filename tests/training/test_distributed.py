"""Two processes that share the work give what one gives: gradients, logs, evaluation, checkpoints."""

import distributed_run
import pytest
import torch
import two_processes
from test_trainer import close
from tiny import tiny

from gradmem_adapter import load_checkpoint
from gradmem_adapter.training.callbacks import LOOK_EVERY

META_GRADIENTS = ("exact", "finite_difference", "first_order")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes saw, and the folder they wrote into; one start for all, because starting takes seconds."""
    folder = tmp_path_factory.mktemp("two")
    results, _ = two_processes.start("training/distributed_run.py", ",".join(META_GRADIENTS), folder, folder=folder)
    return results, folder


@pytest.mark.parametrize("meta_gradient", META_GRADIENTS)
def test_two_processes_are_one(two, tmp_path, meta_gradient):
    results, folder = two
    one = distributed_run.train(tmp_path, 1, meta_gradient)
    for result in (result[meta_gradient] for result in results):
        for shared, alone in zip(result["gradients"], one["gradients"], strict=True):
            close(shared, alone)
        for name, values in one["logs"].items():
            assert result["logs"][name] == pytest.approx(values, rel=1e-4), name
        for name, value in one["metrics"].items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert one["metrics"]["eval_exact_match"] > 0
    first, second = (result[meta_gradient]["weights"] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, _ = load_checkpoint(folder / meta_gradient / "checkpoint-2", backbone=tiny())
    saved = dict(model.named_parameters())
    assert all(torch.equal(saved[name], weight) for name, weight in first.items())


def test_ready_batches(two, tmp_path):
    results, _ = two
    one = distributed_run.train_ready(tmp_path, 1)
    assert set(one["logs"]["write_steps"]) == {1, 2}
    for result in (result["ready"] for result in results):
        for shared, alone in zip(result["gradients"], one["gradients"], strict=True):
            close(shared, alone)
        for name, values in one["logs"].items():
            assert result["logs"][name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("why", ["interrupted", "clock"])
def test_what_one_process_knows_ends_both_at_the_same_step(two, why):
    """A signal that one of them got, or the clock of the first."""
    first, second = (result[why] for result in two[0])
    assert first["step"] == second["step"]
    assert first["seen"] is second["seen"] is (why == "interrupted")
    assert first["saved"] or why == "clock"
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert first["step"] == LOOK_EVERY if why == "interrupted" else first["step"] >= LOOK_EVERY


def test_all_stop_where_one_diverges(two):
    for result in two[0]:
        assert result["diverged"].startswith("The loss is not finite in step 2.")
