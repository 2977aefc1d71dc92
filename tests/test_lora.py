"""The nested LoRA in its phase."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig

IDS = tokens(2, 9)


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | options)


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config)).eval()


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
