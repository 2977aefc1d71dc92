"""Where WRITE starts from."""

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.layer import START_GAIN
from gradmem_adapter.ops.padding import pad


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


@pytest.mark.parametrize("start", ["context", "pooled_context"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_starting_from_the_context_matches_the_equation(architecture, start):
    model = make(architecture, start=start)
    slots = model.base_model.slots
    assert (slots.gradmem_start_gain["default"] == START_GAIN).all()
    rows = [tokens(1, n, seed=n)[0] for n in (7, 2)]
    batch = pad(rows, "left")
    with torch.no_grad():
        gain = slots.gradmem_start_gain["default"].normal_()
        if start == "pooled_context":
            assert (slots.gradmem_pool_gain["default"] == 1).all()
            pool_gain = slots.gradmem_pool_gain["default"].normal_()
    state = model.write(*batch, steps=0)
    for vectors, row in zip(state.vectors, rows, strict=True):
        slot = slots.gradmem_memory["default"].detach()
        embeddings = model.get_input_embeddings()(row)
        # For three vectors, seven tokens are split into 3, 2 and 2; of two tokens, each gets a vector.
        parts = (slice(0, 3), slice(3, 5), slice(5, 7)) if len(row) == 7 else (slice(0, 1), slice(1, 2), slice(0))

        def means(values, parts=parts):
            return torch.stack([values[part].sum(0) / max(1, len(values[part])) for part in parts])

        if start == "pooled_context":
            slot = slot + pool_gain * means(embeddings)
        tokens_in = torch.cat([embeddings, slot])
        hidden = model.get_base_model().base_model(inputs_embeds=tokens_in[None]).last_hidden_state[0]
        torch.testing.assert_close(vectors, (slot + gain * hidden[len(row) :]).detach(), rtol=1e-4, atol=1e-5)
    on = model.write(*batch, initial=state, steps=2)
    torch.testing.assert_close(model.write(*batch).vectors, on.vectors, rtol=1e-4, atol=1e-5)
