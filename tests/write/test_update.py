"""Adding text to a state, which keeps what it can of its earlier text."""

import pytest
import torch
from peft import get_peft_model
from reading import make, pad_left
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig, MemoryState, WriteOptions
from gradmem_adapter.ops.padding import part_means
from gradmem_adapter.write import fidelity
from gradmem_adapter.write.context import Context

LEARN = WriteOptions(steps=80, lr=0.05, optimizer="adam")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=8, memory_init_std=0.5, trained_length=9)
    return get_peft_model(tiny(hidden_size=64), config).eval()


@pytest.fixture(autouse=True)
def sure(monkeypatch):
    """A random model gives every token a low probability."""
    monkeypatch.setattr(fidelity, "CONFIDENT", 0.02)


@pytest.fixture(scope="module")
def texts():
    return tokens(2, 5), tokens(2, 4, seed=1)


@pytest.fixture(scope="module")
def first(model, texts):
    return model.write(texts[0], options=LEARN)


def test_an_update_keeps_the_old_text_where_a_plain_write_forgets_it(model, texts, first):
    old, new = texts
    updated = model.update(first, new, options=LEARN)
    assert updated.context_tokens.tolist() == [9, 9]
    assert updated.vectors.shape == first.vectors.shape
    assert torch.equal(model.reconstruct(updated), torch.cat([old, new], dim=1))
    written_over = model.write(new, initial=first, options=LEARN)
    assert model.fidelity(written_over, old).teacher_forced.mean() < 0.5


def test_states_in_a_batch_do_not_affect_each_other(model, texts, first):
    ids, mask = pad_left([texts[1][0], texts[1][1, :2]])
    together = model.update(first, ids, mask, steps=3)
    alone = model.update(first[1], texts[1][1:, :2], steps=3)
    assert together.context_tokens.tolist() == [9, 7]
    torch.testing.assert_close(together.vectors[1:], alone.vectors)


@pytest.mark.parametrize(("known", "new"), [((5, 3), (4, 4)), ((5, 5), (7, 2)), ((2, 5), (6, 4))])
@pytest.mark.parametrize("limit", [9, None])
def test_each_row_of_a_batch_rehearses_the_same_tokens_as_alone(model, texts, monkeypatch, known, new, limit):
    """A neighbour's longer recital, or the room its longer text leaves, must not matter."""
    monkeypatch.setattr(model.active_peft_config, "trained_length", limit)
    more = tokens(2, 7, seed=1)
    states = [model.write(texts[0][i : i + 1, :n], options=LEARN) for i, n in enumerate(known)]
    ids, mask = pad_left([more[i, :n] for i, n in enumerate(new)])
    together = model.update(MemoryState.stack(states), ids, mask, steps=3)
    for i, state in enumerate(states):
        alone = model.update(state, more[i : i + 1, : new[i]], steps=3)
        torch.testing.assert_close(together.vectors[i : i + 1], alone.vectors)


@pytest.mark.parametrize("start", ["context", "pooled_context"])
def test_each_row_of_a_batch_starts_the_same_as_alone(start, texts):
    model = make(start=start, trained_length=9)
    state, more = model.write(texts[0]), tokens(2, 5, seed=1)
    ids, mask = pad_left([more[0, :4], more[1]])  # the second leaves 4 places for the 5 tokens it is to recite
    together = model.update(state, ids, mask)
    alone = [model.update(state[0], more[:1, :4]), model.update(state[1], more[1:])]
    torch.testing.assert_close(together.vectors, MemoryState.stack(alone).vectors)


def test_an_update_beyond_the_trained_length_keeps_the_beginning(model, texts, first, monkeypatch):
    monkeypatch.setattr(model.active_peft_config, "trained_length", 7)
    updated = model.update(first, texts[1], options=LEARN)
    assert torch.equal(model.reconstruct(updated, 7), torch.cat([texts[0][:, :3], texts[1]], dim=1))


def test_uncertain_tokens_are_not_rehearsed(texts, monkeypatch):
    monkeypatch.setattr(fidelity, "CONFIDENT", 0.25)
    model = make()
    state = model.write(texts[0])
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(0.01)  # every token is as likely as any other
    recited = fidelity.recite(model.base_model._writer, state.vectors, 5)
    assert recited.lengths.tolist() == [0, 0]
    assert recited.input_ids.shape == (2, 0)
    updated = model.update(state, texts[1], strict=False, lr=0.3)  # the model was changed
    torch.testing.assert_close(updated.vectors, model.write(texts[1], initial=state, strict=False, lr=0.3).vectors)


def test_the_recital_stops_at_the_end_token(model, texts):
    end = model.generation_config.eos_token_id
    ids = torch.cat([texts[0], torch.full((2, 2), end)], dim=1)
    state = model.write(ids, options=LEARN)
    assert torch.equal(model.reconstruct(state), ids)
    recited = fidelity.recite(model.base_model._writer, state.vectors, 7)
    assert recited.lengths.tolist() == [5, 5]
    assert torch.equal(recited.input_ids, texts[0])


@pytest.mark.parametrize("start", ["context", "pooled_context"])
def test_recited_tokens_are_rewritten_with_the_new_text(start, texts):
    model, (old, new) = make(start=start, trained_length=9), (ids[:1] for ids in texts)
    state = model.write(old)
    recited = model.reconstruct(state)
    assert (fidelity.recite(model.base_model._writer, state.vectors, 5).lengths == 5).all()
    expected = model.write(torch.cat([recited, new], dim=1))
    torch.testing.assert_close(model.update(state, new).vectors, expected.vectors)


@pytest.mark.parametrize("start", ["context", "pooled_context"])
def test_old_and_new_text_share_the_vectors_without_a_recital(start, texts, monkeypatch):
    monkeypatch.setattr(fidelity, "CONFIDENT", 1.1)
    model = make(start=start, num_memory_tokens=6, num_control_tokens=0, memory_projection="none")
    state = model.write(texts[0])
    long_known = MemoryState(state.vectors, torch.tensor([4, 100]), state.write_losses, state.fingerprint)
    updated = model.update(long_known, texts[1], steps=0)
    assert updated.context_tokens.tolist() == [8, 104]
    # Of 6 vectors, 4 new tokens get 3 beside 4 known tokens and 1 beside 100; the others are means of neighbours.
    torch.testing.assert_close(updated.vectors[0, :3], state.vectors[0].view(3, 2, -1).mean(1))
    pairs = state.vectors[1, :5].clone()
    pairs[0] = state.vectors[1, :2].mean(0)
    pairs[1:] = state.vectors[1, 2:]
    torch.testing.assert_close(updated.vectors[1, :5], pairs)
    # The new vectors are what the slots read from memory and new text, at their usual positions.
    backbone, slots = model.get_base_model(), model.base_model.slots
    tail = slots.gradmem_memory["default"][3:][None]
    new = backbone.get_input_embeddings()(texts[1][:1])
    if start == "pooled_context":
        means = torch.stack([new[:, :2].mean(1), new[:, 2], new[:, 3]], dim=1)
        tail = tail + slots.gradmem_pool_gain["default"] * means
    hidden = backbone.base_model(
        inputs_embeds=torch.cat([state.vectors[:1], new, updated.vectors[:1, :3], tail], dim=1)
    ).last_hidden_state
    expected = tail + slots.gradmem_start_gain["default"] * hidden[:, -3:]
    torch.testing.assert_close(updated.vectors[:1, 3:], expected)


@pytest.mark.parametrize(("length", "known", "vectors"), [(3, 96, 3), (20, 96, 8), (32, 61, 11)])
def test_a_short_text_gets_enough_vectors_beside_a_long_one(length, known, vectors, monkeypatch):
    """One vector per token, up to a quarter of all; a longer text gets its share by tokens if that is more."""
    monkeypatch.setattr(fidelity, "CONFIDENT", 1.1)
    model = make(start="pooled_context", num_memory_tokens=32, num_control_tokens=0, memory_projection="none")
    state = model.write(tokens(1, 40))
    full = MemoryState(state.vectors, torch.tensor([known]), state.write_losses, state.fingerprint)
    updated = model.update(full, tokens(1, length, seed=1), steps=0)
    means, _ = part_means(state.vectors, torch.tensor([32]), 32 - vectors)
    torch.testing.assert_close(updated.vectors[:, : 32 - vectors], means)
    assert not torch.isclose(updated.vectors[0, -vectors], state.vectors[0, -vectors]).all()


def test_invalid_updates_are_refused(model, texts, first):
    with pytest.raises(ValueError, match="Got 1 text for 2 states"):
        model.update(first, texts[1][:1])
    with pytest.raises(ValueError, match="into a state of its own"):
        model.update(first, texts[1], objective="self_study")
    other = MemoryState(first.vectors, first.context_tokens, first.write_losses, "2-other")
    with pytest.raises(ValueError, match="was written by model 2-other"):
        model.update(other, texts[1])


def test_an_update_changes_neither_the_state_nor_the_model(model, texts, first):
    before, weights = first.to_bytes(), model.base_model.fingerprint()
    with torch.inference_mode():
        model.update(first, texts[1], steps=1)
    assert first.to_bytes() == before
    assert model.base_model.fingerprint() == weights
    assert isinstance(fidelity.recite(model.base_model._writer, first.vectors, 0), Context)
