"""Bulk WRITE: order, budget, memory that runs out, bad input before any work."""

import sys
import warnings

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import VOCABULARY, tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils import hardware
from gradmem_adapter.write import budget
from gradmem_adapter.write.batching import batches
from gradmem_adapter.write.budget import Budget


@pytest.fixture(scope="module")
def model():
    config = GradMemConfig(num_memory_tokens=3, write_steps=2, write_lr=0.3, memory_init_std=0.5)
    return get_peft_model(tiny(), config).eval()


def contexts(*lengths):
    return [tokens(1, length, seed=seed)[0] for seed, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_hold_each_context_once_within_the_budget(lengths, budget):
    found = batches(lengths, budget)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    assert [max(lengths[i] for i in batch) for batch in found] == sorted(
        (max(lengths[i] for i in batch) for batch in found), reverse=True
    )


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), budget=st.integers(1, 120))
def test_states_equal_those_written_alone_and_keep_their_order(model, lengths, budget):
    rows = contexts(*lengths)
    state = model.write_many(rows, max_tokens=budget)
    assert state.context_tokens.tolist() == lengths
    for row, one in zip(rows, state, strict=True):
        alone = model.write(row[None])
        assert ((one.vectors - alone.vectors).norm() / alone.vectors.norm()).item() < 1e-5
        torch.testing.assert_close(one.write_losses, alone.write_losses, rtol=1e-5, atol=1e-6)


def test_lists_of_ids_and_options_are_accepted(model):
    state = model.write_many([[5, 6, 7], [8, 9]], steps=4, lr=0.1)
    assert state.write_losses.shape == (2, 5)
    torch.testing.assert_close(state[1].vectors, model.write(torch.tensor([[8, 9]]), steps=4, lr=0.1).vectors)


def test_samples_that_stop_after_different_steps_are_stacked(model):
    rows = contexts(3, 40)
    options = {"steps": 60, "lr": 0.3, "tolerance": 1e-3}
    state = model.write_many(rows, max_tokens=1, **options)
    alone = [model.write(row[None], **options).write_losses for row in rows]
    assert alone[0].shape != alone[1].shape
    assert state.write_losses.shape[1] == max(losses.shape[1] for losses in alone)
    for one, losses in zip(state, alone, strict=True):
        assert one.write_losses[0, -1] == losses[0, -1]


def test_a_context_that_does_not_fit_is_named(model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model.base_model, "_write", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="Context 1 with 30 tokens does not fit"):
        model.write_many(contexts(7, 30, 12), max_tokens=100)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "Context 1 is empty"),
        ([VOCABULARY], ValueError, "Context 1 holds token ids"),
        ([1.5], TypeError, "Context 1 must hold integer"),
        ([1] * 1000, ValueError, "Context 1 has 1,000 tokens"),
        ([[1, 2]], ValueError, "Context 1 must be token ids of shape"),
        ("text", TypeError, "Context 1 must be token ids, got str"),
        (None, TypeError, "Context 1 must be token ids, got NoneType"),
        ([1, [2]], TypeError, "Context 1 must be token ids, got list"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(model, monkeypatch, bad, error, message):
    monkeypatch.setattr(model.base_model, "_write", None)
    with pytest.raises(error, match=message):
        model.write_many([[1, 2, 3], bad, [4]])


def test_a_diverging_context_is_named_by_its_index_in_the_input():
    config = GradMemConfig(num_memory_tokens=3, write_steps=1, write_lr=0.3)
    model = get_peft_model(tiny(), config).eval()
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[4] = torch.nan
    rows = [[5] * 3, [4] * 4, [5] * 20, [4] * 9, [5] * 4]
    with pytest.warns(RuntimeWarning, match="is not finite") as caught:
        model.write_many(rows, max_tokens=10)
    assert [str(warning.message).split(" is not")[0] for warning in caught] == [
        "The write loss of sample 3",
        "The write loss of sample 1",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_a_later_batch_leaves_the_model_unchanged(model, monkeypatch, error):
    rows = contexts(5, 20, 9)
    expected, fingerprint = model.write_many(rows, max_tokens=1), model.fingerprint()
    write, calls = model.base_model._write, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error("enough")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.base_model, "_write", fail)
        with pytest.raises(error, match="enough"):
            model.write_many(rows, max_tokens=1, progress=True)
    assert len(calls) == 2
    assert model.fingerprint() == fingerprint
    assert model.write_many(rows, max_tokens=1).equal(expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tokens": 0}, ValueError),
        ({"max_tokens": True}, ValueError),
        ({"max_tokens": 2.5}, ValueError),
        ({"steps": -1}, ValueError),
        ({"initial": 1}, TypeError),
    ],
)
def test_invalid_options_are_refused(model, options, error):
    with pytest.raises(error, match=next(iter(options))):
        model.write_many([[1, 2, 3]], **options)
    with pytest.raises(ValueError, match="no context"):
        model.write_many([])


def test_the_budget_follows_free_memory(model, monkeypatch):
    memory, backbone = psutil.virtual_memory(), model.get_base_model()
    own = Budget.of(backbone)
    for free, expected in ((2**40, hardware.SATURATED["cpu"]), (0, 1)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory._replace(available=free))
        assert own.tokens() == expected
    few, twice = (own.tokens(max_memory) for max_memory in (2**20, 2**21))
    assert 1 < few < hardware.SATURATED["cpu"]
    assert twice == pytest.approx(2 * few, abs=1)


class TestMemory:
    """What does not fit is refused before it starts: the system would kill the process without a message."""

    def test_a_write_that_does_not_fit_is_refused(self, model, monkeypatch):
        for write in (
            lambda **options: model.write(tokens(2, 9), **options),
            lambda **options: model.write_many(contexts(4, 9), **options),
        ):
            assert len(write(max_memory=2**20)) == 2
            with pytest.raises(MemoryError, match=r"of 9 tokens takes about .* GB are allowed\. .*write_document"):
                write(max_memory=1000)
        monkeypatch.setattr(budget, "UNCHECKED", 0)
        monkeypatch.setattr(budget, "free_memory", lambda device: 10**4)
        with pytest.raises(MemoryError, match=r"of 9 tokens takes about .* 1e-05 GB are free"):
            model.write(tokens(2, 9))

    @pytest.mark.parametrize(
        ("line", "folder", "files"),
        [
            ("0::/a/b", "a", {"memory.max": 10**6, "memory.current": 4 * 10**5, "memory.stat": "inactive_file 5"}),
            ("0::/", "", {"memory.max": 10**6, "memory.current": 4 * 10**5, "memory.stat": "anon 1\ninactive_file 5"}),
            (
                "4:memory:/of/the/host",
                "memory",
                {
                    "memory.limit_in_bytes": 10**6,
                    "memory.usage_in_bytes": 4 * 10**5,
                    "memory.stat": "inactive_file 1\ntotal_inactive_file 5",
                },
            ),
        ],
    )
    def test_free_memory_respects_the_limits_of_a_container(self, monkeypatch, tmp_path, line, folder, files):
        own = tmp_path / "cgroup"
        own.write_text(f"7:cpu:/else\n{line}\n")
        (tmp_path / "groups" / folder).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / "groups" / folder / name).write_text(str(content))
        monkeypatch.setattr(hardware, "_GROUPS", tmp_path / "groups")
        monkeypatch.setattr(hardware, "_OWN_GROUPS", own)
        assert hardware.free_memory(torch.device("cpu")) == 600_005
        for name in files.keys() - {"memory.stat"}:
            (tmp_path / "groups" / folder / name).write_text("max")
        assert hardware.free_memory(torch.device("cpu")) > 600_005


def test_contexts_beyond_the_trained_length_give_one_warning():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, trained_length=8)).eval()
    for write in (
        lambda: model.write(tokens(3, 12)),
        lambda: model.write_many(contexts(3, 12, 11, 9), max_tokens=12),
    ):
        with pytest.warns(UserWarning, match="trained") as told:
            write()
        assert len(told) == 1
        assert "has 12 tokens, and the adapter was trained on up to 8 " in str(told[0].message)
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.write(tokens(3, 8))
        model.write_many(contexts(3, 8))


@pytest.mark.parametrize("refusal", [None, "not in memory"])
def test_contexts_too_long_for_good_answers_give_a_warning(refusal):
    """Only with adapters for questions about any text; one trained for a single kind of text may keep more."""
    config = GradMemConfig(num_memory_tokens=3, trained_length=40, refusal=refusal)
    model = get_peft_model(tiny(), config).eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.write(tokens(1, 12))
        assert not told
        model.write(tokens(1, 13))
    assert len(told) == (refusal is not None)
    said = "has 13 tokens, and questions are answered best from states of up to 6 and much worse from longer ones"
    assert all(said in str(warning.message) for warning in told)


def test_progress_is_shown_on_request(model, capsys):
    model.write_many(contexts(3, 4), progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""
    assert not sys.stderr.isatty()
    model.write_many(contexts(3, 4))
    assert capsys.readouterr().err == ""


def test_done_receives_states_batch_by_batch(model):
    """So that nothing is lost when a later batch fails."""
    rows, landed = contexts(9, 4, 7), []
    states = model.write_many(rows, max_tokens=9, done=lambda indices, states: landed.append((indices, states)))
    assert [indices for indices, _ in landed] == [[0], [2], [1]]
    assert all(written == states[indices] for indices, written in landed)
