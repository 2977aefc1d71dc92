"""The nested LoRA in its phase."""

import copy
import pickle

import pytest
import torch
from adapters import lora, make
from tiny import tokens

from gradmem_adapter import GradMemConfig

IDS = tokens(2, 9)


@pytest.mark.parametrize("phase", ["both", "write", "read"])
def test_the_lora_acts_only_in_its_phase(phase):
    model, plain = make(lora_config=lora(), lora_phase=phase), make()
    slots = plain.base_model.slots.gradmem_memory["default"]
    with torch.no_grad():
        slots.copy_(model.base_model.slots.gradmem_memory["default"])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        state, without = each.write(IDS), plain.write(IDS)
        assert torch.equal(state.vectors, without.vectors) == (phase == "read")
        read = [each(input_ids=IDS, memory=without, strict=False).logits, plain(input_ids=IDS, memory=without).logits]
        assert torch.equal(*read) == (phase == "write")
        assert each.get_model_status().enabled is True


@pytest.mark.parametrize("phase", ["both", "write", "read"])
def test_an_adapter_does_not_take_the_phase_of_a_deleted_namesake(phase):
    """Its LoRA is on the layers of another adapter, which stay."""
    model, fresh = make(lora_config=lora()), make(lora_config=lora(), lora_phase=phase)
    for earlier in ("write", "read"):
        model.add_adapter("other", GradMemConfig(lora_config=lora(), lora_phase=earlier))
        model.delete_adapter("other")
    model.add_adapter("other", fresh.peft_config["default"])
    model.set_adapter("other")
    with torch.no_grad():
        for ours, theirs in zip(trained(model), trained(fresh), strict=True):
            theirs.copy_(ours)
    state = model.write(IDS)
    assert fresh.write(IDS).equal(state)
    assert torch.equal(*(each(input_ids=IDS, memory=state).logits for each in (model, fresh)))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
