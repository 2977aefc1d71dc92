"""The nested LoRA in its phase."""

import copy

import pytest
import torch
from adapters import lora, make
from tiny import tokens

IDS = tokens(2, 9)


@pytest.mark.parametrize("phase", ["both", "write", "read"])
def test_lora_acts_in_its_phase_alone(phase):
    model, plain = make(lora_config=lora(), lora_phase=phase), make()
    slots = plain.base_model.slots.gradmem_memory["default"]
    with torch.no_grad():
        slots.copy_(model.base_model.slots.gradmem_memory["default"])
    for each in (model, copy.deepcopy(model)):
        state, without = each.write(IDS), plain.write(IDS)
        assert torch.equal(state.vectors, without.vectors) == (phase == "read")
        read = [each(input_ids=IDS, memory=without, strict=False).logits, plain(input_ids=IDS, memory=without).logits]
        assert torch.equal(*read) == (phase == "write")
        assert each.get_model_status().enabled is True
