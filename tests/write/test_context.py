"""Contexts: padding on either side, lengths that fit, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import ARCHITECTURES, VOCABULARY, tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.capture import static_shapes
from gradmem_adapter.write.context import Context


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


def padded(rows, side, length=None):
    """[B, N] ids and mask of token lists, padded with 0."""
    length = length or max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def _shared(cache=[]):  # noqa: B006 - made once for all Hypothesis examples
    if not cache:
        cache.append(make())
    return cache[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_context_gives_the_same_state_alone_and_in_a_padded_batch(architecture, side):
    model = make(architecture)
    rows = [tokens(1, n, seed=n)[0] for n in (17, 4, 9)]
    together = model.write(*padded(rows, side, length=20))
    for i, row in enumerate(rows):
        alone = model.write(row[None])
        torch.testing.assert_close(together.vectors[i], alone.vectors[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.write_losses[i], alone.write_losses[0], rtol=1e-5, atol=1e-6)
        assert together.context_tokens[i] == len(row)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_contexts_of_any_length_padded_on_either_side(lengths, side, steps):
    model = _shared()
    rows = [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    state = model.write(*padded(rows, side), steps=steps)
    assert state.vectors.shape == (len(rows), 3, 32)
    assert state.write_losses.shape == (len(rows), steps + 1)
    assert state.context_tokens.tolist() == lengths
    last = model.write(rows[-1][None], steps=steps)
    torch.testing.assert_close(state.vectors[-1], last.vectors[0], rtol=1e-4, atol=1e-6)


def test_padding_inside_a_context_is_skipped():
    model = make()
    ids = torch.tensor([[0, 5, 0, 6, 7, 0]])
    state = model.write(ids, torch.tensor([[0, 1, 0, 1, 1, 0]]))
    torch.testing.assert_close(state.vectors, model.write(torch.tensor([[5, 6, 7]])).vectors)


def test_padding_is_not_trimmed_for_graph_capture():
    ids, mask = tokens(2, 9), torch.tensor([[1] * 5 + [0] * 4] * 2)
    assert Context.from_tokens(ids, mask, tiny(), 3).input_ids.shape == (2, 5)
    with static_shapes():
        context = Context.from_tokens(ids, mask, tiny(), 3)
    assert context.input_ids.shape == (2, 9)
    assert context.lengths.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, ValueError, "batch size 0"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "Context 0, 1 is empty"),
        (
            {"input_ids": tokens(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            ValueError,
            "Context 1 is empty",
        ),
        ({"input_ids": tokens(1, 94)}, ValueError, "has 94 tokens, but at most 93 are allowed"),
        (
            {"input_ids": torch.tensor([[3, VOCABULARY]])},
            ValueError,
            f"from 3 to {VOCABULARY}, but the model knows 0 to",
        ),
        ({"input_ids": torch.tensor([[-1, 3]])}, ValueError, "from -1 to 3"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 4)}, ValueError, "different shapes"),
        ({"input_ids": tokens(1, 3)[0]}, ValueError, r"shape \[batch, length\]"),
        ({"input_ids": tokens(1, 3).float()}, TypeError, "integer token ids"),
        ({"input_ids": [[1, 2]]}, TypeError, "must be a tensor"),
        ({"input_ids": tokens(1, 3), "steps": -1}, ValueError, "steps must be"),
        ({"input_ids": tokens(1, 3), "lr": 0.0}, ValueError, "lr must be"),
        ({"input_ids": tokens(1, 3), "lr": float("nan")}, ValueError, "lr must be"),
        ({"input_ids": tokens(1, 3), "optimizer": "lion"}, ValueError, "optimizer must be"),
        ({"input_ids": tokens(1, 3), "tolerance": 2.0}, ValueError, "tolerance must be"),
        ({"input_ids": tokens(1, 3), "step": 3}, TypeError, "no option step. Did you mean steps"),
        ({"input_ids": tokens(1, 3), "initial": torch.zeros(1, 3, 32)}, TypeError, "must be a MemoryState"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make().write(**arguments)


def test_the_longest_allowed_context_is_written():
    state = make("gpt2", num_control_tokens=2).write(tokens(1, 96 - 7), steps=1)
    assert state.write_losses.isfinite().all()
