"""A trial runs on a copy, so that it does not undo what other threads do to the backbone meanwhile."""

from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from adapters import lora
from peft import get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.trial import sample_tokens, trial_of


def test_changes_to_a_model_during_a_trial_stay():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, lora_config=lora()), "first")
    model.add_adapter("second", GradMemConfig(num_memory_tokens=3, lora_config=lora()))
    backbone = model.get_base_model().eval()
    layer = backbone.model.layers[0].self_attn.q_proj
    with trial_of(backbone):
        model.set_adapter("second")
        model.train()
        backbone.model.register_buffer("calls", torch.zeros(()))
    assert layer.active_adapters == ["second"]
    assert all(module.training for module in backbone.modules())
    assert "calls" in backbone.model._buffers


def test_overlapping_trials_do_not_change_the_training_mode():
    backbone = tiny().train()
    first, second = trial_of(backbone), trial_of(backbone)
    first.__enter__()
    second.__enter__()
    assert all(module.training for module in backbone.modules())
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert all(module.training for module in backbone.modules())


def as_it_is(backbone):
    return backbone


def offloaded(backbone):
    return cpu_offload(backbone, execution_device=torch.device("cpu"))


def patched(backbone):
    backbone.model.forward = MethodType(type(backbone.model).forward, backbone.model)
    return backbone


def compiled_in_parts(backbone):
    backbone.lm_head.compile(backend="eager")
    backbone.model.layers[0] = torch.compile(backbone.model.layers[0], backend="eager")
    backbone.model.norm.forward = torch.compile(backbone.model.norm.forward, backend="eager")
    return backbone


@pytest.mark.parametrize("change", [as_it_is, offloaded, patched, compiled_in_parts])
def test_the_copy_computes_the_same_with_modules_of_its_own(change):
    expected = tiny()(tokens(1, 5)).logits
    backbone = change(tiny()).train()
    ran = []
    with trial_of(backbone) as copied, torch.no_grad():
        for module in copied.modules():
            module.register_forward_pre_hook(lambda module, _: ran.append(module))
        torch.testing.assert_close(copied(tokens(1, 5)).logits, expected)
    assert not set(ran) & set(backbone.modules())
    assert ran
    assert not any(module.training for module in ran)
    assert not any(module._forward_pre_hooks for module in backbone.modules())


def test_sample_tokens_ignore_the_default_device():
    backbone = tiny()
    with torch.device("meta"):
        there = sample_tokens(backbone, rows=2)
    assert torch.equal(there, sample_tokens(backbone, rows=2))
