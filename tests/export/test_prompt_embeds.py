"""States in base64 hold what READ puts before a query, and nothing else."""

import base64
import io

import pytest
import torch
from adapters import make
from tiny import tokens

from gradmem_adapter import MemoryState
from gradmem_adapter.export import prompt_embeds


def decoded(text):
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)


@pytest.fixture(scope="module")
def model():
    return make(num_control_tokens=1, memory_projection="shared")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_prompt_embeds_are_the_prefix(model, dtype):
    states = model.write(tokens(3, 9))
    texts, prefix = prompt_embeds(model, states, dtype), model.prefix_embeddings(states)
    assert len(texts) == 3
    for text, expected in zip(texts, prefix, strict=True):
        assert torch.equal(decoded(text), expected.to(dtype))


def test_prompt_embeds_hold_no_other_state(model):
    """A view would be saved with its whole storage."""
    states = model.write(tokens(40, 9))
    assert len(prompt_embeds(model, states)[0]) == len(prompt_embeds(model, states[0])[0])


def test_states_that_no_engine_may_read_are_refused(model):
    state = model.write(tokens(1, 9))
    broken = MemoryState(state.vectors * float("nan"), state.context_tokens, state.write_losses, state.fingerprint)
    with pytest.raises(ValueError, match="not finite"):
        prompt_embeds(model, broken)
    other = make(num_control_tokens=2)
    with pytest.raises(ValueError, match="written by model"):
        prompt_embeds(other, state)
