"""What a state gives back: reconstruct and fidelity."""

import pytest
import torch
from reading import make, pad_left
from tiny import ARCHITECTURES, tokens

from gradmem_adapter import MemoryState


@pytest.mark.parametrize("write_head", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reconstruct_equals_argmax_of_the_write_model(architecture, write_head):
    """Greedy decoding from memory by definition: one whole pass of the WRITE model per token."""
    model = make(architecture, write_head=write_head)
    context = tokens(2, 5)
    state = model.write(context, steps=4)
    got = model.reconstruct(state, 5)
    writer = model.base_model._writer
    for i in range(2):
        prefix = writer.slots.prefix(state.vectors[i : i + 1], "write", "default")
        ids = torch.zeros(1, 0, dtype=torch.long)
        for _ in range(5):
            whole = torch.cat([prefix, model.get_input_embeddings()(ids)], dim=1)
            if write_head:
                hidden = model.get_base_model().base_model(inputs_embeds=whole).last_hidden_state
                logits = model.base_model.slots.gradmem_write_head["default"](hidden)
            else:
                logits = model.get_base_model()(inputs_embeds=whole).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(got[i], ids[0])
    fidelity = model.fidelity(state, context)
    torch.testing.assert_close(fidelity.greedy, (got == context).float().mean(1))


def test_reconstruct_stops_at_the_last_position():
    """A document written sequentially can have any number of tokens, and a state file can claim any number."""
    model = make()
    state = model.write(tokens(1, 5), steps=0)
    endless = MemoryState(state.vectors, torch.tensor([2**40]), state.write_losses, state.fingerprint)
    assert model.reconstruct(endless).shape == (1, model.positions - model.prefix_length)


def test_fidelity_ignores_padding():
    model = make()
    ids, mask = pad_left([tokens(1, 5)[0], tokens(1, 3, seed=2)[0]])
    state = model.write(ids, mask)
    together = model.fidelity(state, ids, mask)
    alone = model.fidelity(state[1], tokens(1, 3, seed=2))
    torch.testing.assert_close(together.greedy[1], alone.greedy[0])
    torch.testing.assert_close(together.teacher_forced[1], alone.teacher_forced[0])
    with pytest.raises(ValueError, match=r"2 contexts for 1 state\."):
        model.fidelity(state[0], ids, mask)
