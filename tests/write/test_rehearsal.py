"""More text into a state, which keeps what it can recite of the earlier."""

import pytest
import torch
from peft import get_peft_model
from reading import make, pad_left
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig, MemoryState, WriteOptions
from gradmem_adapter.write import fidelity
from gradmem_adapter.write.context import Context

LEARN = WriteOptions(steps=80, lr=0.05, optimizer="adam")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=8, memory_init_std=0.5)
    return get_peft_model(tiny(hidden_size=64), config).eval()


@pytest.fixture(scope="module")
def texts():
    return tokens(2, 5), tokens(2, 4, seed=1)


@pytest.fixture(scope="module")
def first(model, texts):
    return model.write(texts[0], options=LEARN)


def test_an_update_keeps_the_old_text_where_a_plain_write_forgets_it(model, texts, first):
    old, new = texts
    updated = model.update(first, new, limit=20, options=LEARN)
    assert updated.context_tokens.tolist() == [9, 9]
    assert updated.vectors.shape == first.vectors.shape
    assert torch.equal(model.reconstruct(updated), torch.cat([old, new], dim=1))
    written_over = model.write(new, initial=first, options=LEARN)
    assert model.fidelity(written_over, old).teacher_forced.mean() < 0.5


def test_states_of_a_batch_do_not_touch_each_other(model, texts, first):
    ids, mask = pad_left([texts[1][0], texts[1][1, :2]])
    together = model.update(first, ids, mask, limit=20, steps=3)
    alone = model.update(first[1], texts[1][1:, :2], limit=20, steps=3)
    assert together.context_tokens.tolist() == [9, 7]
    torch.testing.assert_close(together.vectors[1:], alone.vectors)


def test_a_state_at_its_limit_keeps_the_beginning(model, texts, first):
    updated = model.update(first, texts[1], limit=7, options=LEARN)
    assert updated.context_tokens.tolist() == [7, 7]
    assert torch.equal(model.reconstruct(updated), torch.cat([texts[0][:, :3], texts[1]], dim=1))


def test_what_memory_is_not_sure_of_is_not_rehearsed(texts):
    model = make()
    state = model.write(texts[0])
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(0.01)  # every token is as likely as any other
    assert model.update(state, texts[1], strict=False).context_tokens.tolist() == [4, 4]


def test_the_recital_ends_with_the_text(model, texts):
    end = model.generation_config.eos_token_id
    ids = torch.cat([texts[0], torch.full((2, 2), end)], dim=1)
    state = model.write(ids, options=LEARN)
    assert torch.equal(model.reconstruct(state), ids)
    recited = fidelity.recite(model.base_model._writer, state.vectors, 7)
    assert recited.lengths.tolist() == [5, 5]
    assert torch.equal(recited.input_ids, texts[0])


def test_an_update_of_a_context_start_is_a_write_of_the_recital_and_the_new_text(texts):
    model = make(start="pooled_context")
    state = model.write(texts[0])
    recited = fidelity.recite(model.base_model._writer, state.vectors, 5)
    whole = [torch.cat([ids[:n], new]) for ids, n, new in zip(*recited, texts[1], strict=True)]
    expected = [model.write(ids[None]).vectors for ids in whole]
    torch.testing.assert_close(model.update(state, texts[1], limit=9).vectors, torch.cat(expected))


def test_the_limit_is_the_trained_length(texts):
    model = make(trained_length=5)
    state = model.write(texts[0])
    assert model.update(state, texts[1]).context_tokens.max() <= 5
    with pytest.raises(ValueError, match="A text of 5 tokens leaves no room for what the state knows, of 5 in all"):
        model.update(state, tokens(2, 5))


def test_what_cannot_be_updated_is_refused(model, texts, first):
    with pytest.raises(ValueError, match="2 states for 1 texts"):
        model.update(first, texts[1][:1])
    with pytest.raises(ValueError, match="cannot be recited"):
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
