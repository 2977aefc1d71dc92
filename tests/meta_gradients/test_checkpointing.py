"""Gradient checkpointing: what a backward pass recomputes belongs to the phase of its forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


def gradients(model, checkpointing):
    """Gradients of all trained parameters by name, from one pass of WRITE and READ."""
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 9)
    model(input_ids=ids[:, :4], labels=ids[:, :4], context_input_ids=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
@pytest.mark.parametrize("phase", ["write", "read", "both"])
def test_gradient_checkpointing_changes_nothing(phase, meta_gradient):
    results = {}
    for checkpointing in (False, True):
        config = GradMemConfig(
            num_memory_tokens=3,
            meta_gradient=meta_gradient,
            reconstruction_weight=0.5,
            lora_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
            lora_phase=phase,
        )
        model = get_peft_model(tiny(attn_implementation="eager"), config)
        model.train()
        results[checkpointing] = gradients(model, checkpointing)
    assert results[True].keys() == results[False].keys()
    for name, value in results[True].items():
        torch.testing.assert_close(value, results[False][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert"])
def test_exact_recomputes_fused_attention_as_plain_attention(architecture):
    """Fused kernels have no double backward, and checkpointed layers are recomputed inside one."""
    results = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make(architecture, write_steps=2, lora_config=LoraConfig(r=2, target_modules="all-linear"))
        assert model.get_base_model().config._attn_implementation == "sdpa"
        for module in model.modules():  # as `train`, but without dropout
            module.training = not isinstance(module, torch.nn.Dropout)
        results[checkpointing] = gradients(model, checkpointing)
    assert results[True].keys() == results[False].keys()
    for name, value in results[True].items():
        torch.testing.assert_close(value, results[False][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["context", "pooled_context"])
def test_checkpointing_a_context_start_with_a_one_phase_lora_is_refused(start):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = make(start=start, lora_config=lora, lora_phase="write", meta_gradient="finite_difference")
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 9)
    model.write(ids)
    with pytest.raises(NotImplementedError, match=f"start='{start}' cannot be trained"):
        model(input_ids=ids[:, :4], labels=ids[:, :4], context_input_ids=ids)
