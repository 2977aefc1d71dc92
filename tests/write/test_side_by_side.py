"""States side by side have more vectors than the adapter has slots; length checks count the actual vectors."""

import pytest
import torch
from adapters import make
from tiny import tokens

from gradmem_adapter import MemoryState
from gradmem_adapter.write import fidelity

POSITIONS = 96
MODELS = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def side_by_side(model, states=8, length=5):
    """One state of 3 vectors per context; the model has 96 positions."""
    return MemoryState.concat(list(model.write(tokens(states, length))))


@MODELS
def test_the_longest_context_behind_states_side_by_side(architecture):
    model = make(architecture)
    state = side_by_side(model)
    fits, too_long = tokens(1, POSITIONS - 24), tokens(1, POSITIONS - 23)
    for write in (
        lambda ids: model.write(ids, initial=state).vectors,
        lambda ids: model.update(state, ids).vectors,
        lambda ids: model.fidelity(state, ids).teacher_forced,
    ):
        assert write(fits).isfinite().all()
        with pytest.raises(
            ValueError, match=r"has 73 tokens, but at most 72 are allowed: .* 24 of them for the memory"
        ):
            write(too_long)


@MODELS
def test_rehearsed_tokens_fit_behind_states_side_by_side(architecture, monkeypatch):
    monkeypatch.setattr(fidelity, "CONFIDENT", 0.0)
    model = make(architecture)
    model.generation_config.eos_token_id = None
    written = []
    monkeypatch.setattr(model.base_model, "_check_conditions", written.append)
    model.update(side_by_side(model, length=40), tokens(1, 40))
    assert written[-1] == POSITIONS - 24


@MODELS
def test_reconstruction_is_limited_by_the_positions(architecture):
    model = make(architecture)
    one, several = model.write(tokens(1, 5)), side_by_side(model, length=40)
    assert model.reconstruct(several).shape == (1, POSITIONS - 24)
    assert model.reconstruct(one, POSITIONS - 3).shape == (1, POSITIONS - 3)
    assert model.reconstruct(one, 0).shape == (1, 0)
    for state, most in ((one, 93), (several, 72)):
        for wrong in (-1, most + 1, 200):
            with pytest.raises(ValueError, match=rf"max_new_tokens must be between 0 and {most}, .*; got {wrong}"):
                model.reconstruct(state, wrong)
    with pytest.raises(ValueError, match="The state has 96 vectors, but the model has only 96 positions"):
        model.reconstruct(side_by_side(model, 32))


@MODELS
@pytest.mark.parametrize("start", ["context", "pooled_context"])
def test_an_update_needs_positions_for_old_memory_new_text_and_new_vectors(architecture, start, monkeypatch):
    model = make(architecture, start=start)
    state = model.write(tokens(1, 40))
    monkeypatch.setattr(fidelity, "CONFIDENT", 1.1)
    assert model.update(state, tokens(1, POSITIONS - 6)).vectors.isfinite().all()
    with pytest.raises(
        ValueError, match=rf"A new text has 91 tokens, but at most 90 .* start='{start}' .* 96 positions"
    ):
        model.update(state, tokens(1, POSITIONS - 5))


def test_rates_per_element_need_a_memory_as_large_as_the_slots():
    model = make(learn_write_lr="per_element")
    state, ids = side_by_side(model, 2), tokens(1, 5)
    for write in (lambda **how: model.write(ids, initial=state, **how), lambda **how: model.update(state, ids, **how)):
        with pytest.raises(ValueError, match=r"has 6 vectors, .* learned write learning rates for memories of 3"):
            write()
        assert write(lr=0.1).vectors.shape == write(steps=0).vectors.shape == (1, 6, 32)
    assert torch.equal(model.write(ids, initial=state, steps=0).vectors, state.vectors)
