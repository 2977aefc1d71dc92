"""Two processes that train one model in the loop of captured steps: equal weights, averaged gradients, one end."""

import processes_run
import pytest
import torch
from tiny import tiny

from gradmem_adapter import load_checkpoint
from gradmem_adapter.tasks import kv_training
from gradmem_adapter.training import processes
from gradmem_adapter.training.graphed_run import run_graphed


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes saw, the folder they wrote into, and what they printed; one start for all."""
    folder = tmp_path_factory.mktemp("two")
    results, done = processes_run.start(folder, "cpu")
    return results, folder, done


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def state(folder):
    return torch.load(folder / "last" / "state.pt", weights_only=True)


def test_two_processes_are_one_that_averages_the_losses_of_both_their_batches(two, tmp_path, monkeypatch):
    def averaged(model, loss, plan, *arguments, **options):
        streams = [torch.Generator().manual_seed(plan.seed + rank).get_state() for rank in range(2)]

        def both(kind):
            values = []
            for rank, stream in enumerate(streams):
                torch.set_rng_state(stream)
                values.append(loss(kind))
                streams[rank] = torch.get_rng_state()
            assert not torch.equal(*streams)
            return {name: (value + values[1][name]) / 2 for name, value in values[0].items()}

        return run_graphed(model, both, plan, *arguments, **options)

    monkeypatch.setattr(kv_training, "run_graphed", averaged)
    one = processes_run.train(processes_run.plan(), tmp_path, "cpu")
    first, second = (result["whole"] for result in two[0])
    same(first["weights"], second["weights"])
    same(
        {name: first["weights"][name] for name in state(two[1] / "whole")["weights"]},
        state(two[1] / "whole")["weights"],
    )
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert first["logs"] == second["logs"]
    for (step, means), (at, expected) in zip(first["logs"], one["logs"], strict=True):
        assert step == at
        assert {kind: pytest.approx(values, rel=1e-3) for kind, values in expected.items()} == means


def test_a_run_that_is_stopped_goes_on_in_both_with_other_data_in_each(two):
    for result in two[0]:
        assert result["parts"]["end"] is False
        assert [step for step, _ in result["parts"]["logs"]] == [2, 4]
        assert result["resumed"]["end"] is True
        assert [step for step, _ in result["resumed"]["logs"]] == [6, 8]
    first, second = (result["resumed"] for result in two[0])
    same(first["weights"], second["weights"])
    assert not torch.equal(first["random"][0], second["random"][0])
    assert torch.equal(first["random"][0], two[0][0]["whole"]["random"][2])  # that of process 0 was saved
    assert not torch.equal(second["random"][0], two[0][1]["whole"]["random"][2])


@pytest.mark.parametrize("name", ["within", "max_seconds"])
def test_the_clock_of_process_0_ends_both_at_the_same_step(two, name):
    first, second = (result[name] for result in two[0])
    assert first["end"] is second["end"] is (name == "within")
    assert first["logs"] == second["logs"]
    assert first["logs"][-1][0] == state(two[1] / name)["step"]
    assert state(two[1] / name)["seconds"] >= 0.5
    same(first["weights"], second["weights"])


def test_a_signal_ends_both_at_the_same_step(two):
    first, second = (result["interrupted"] for result in two[0])
    assert first["end"] == second["end"] == "KeyboardInterrupt: "
    assert first["logs"] == second["logs"]
    assert state(two[1] / "interrupted")["step"] == first["logs"][-1][0] == 4
    same(first["weights"], second["weights"])


def test_both_stop_where_one_diverges(two):
    for result in two[0]:
        assert result["diverged"]["end"].startswith(
            "TrainingDiverged: The loss or a gradient is no longer finite at step 6"
        )
    assert state(two[1] / "diverged")["step"] == 4


def test_the_command(two):
    results, folder, done = two
    assert [result["command"] for result in results] == [0, 0]
    kinds = {kind for _, means in results[0]["whole"]["logs"] for kind in means}
    assert (done.stdout.count("Saved: "), done.stdout.count("step 8, ")) == (1, len(kinds))  # by process 0 alone
    same(state(folder / "command")["weights"], state(folder / "whole")["weights"])
    load_checkpoint(folder / "command" / "checkpoint")
    assert [result["refused"] for result in results] == [2, 2]
    assert "by another recipe: seed differs" in " ".join(done.stderr.split())


def test_one_process_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = tiny()
    parameters = list(model.parameters())
    parameters[0].grad = gradient = torch.ones_like(parameters[0])
    with processes.joined(torch.device("cpu")) as device, processes.one_after_another():
        assert not torch.distributed.is_initialized()
        assert device == torch.device("cpu")
        assert (processes.rank(), processes.world_size()) == (0, 1)
        assert processes.agree(0.1, True) == (0.1, True)
        assert processes.average(gradient) is gradient
        processes.average_gradients(parameters)
        processes.share_weights(model)
        processes.barrier()
    assert parameters[0].grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize(
    ("device", "rank", "message"),
    [
        ("cuda", "2", r"Process 2 of this machine has no GPU: there are 2\. Start as many processes as GPUs"),
        ("cuda:1", "0", "all cannot run on cuda:1"),
        ("cuda", None, "WORLD_SIZE is set and LOCAL_RANK is not"),
    ],
)
def test_processes_without_a_gpu_of_their_own_are_refused(device, rank, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(ValueError, match=message), processes.joined(torch.device(device)):
        pass
