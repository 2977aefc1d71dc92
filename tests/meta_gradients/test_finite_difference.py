"""The finite difference: how close it is to the exact meta-gradient, and inputs without direction or scale."""

import copy
import warnings

import pytest
import torch
from outer import relative, train_step
from peft import get_peft_model
from tiny import tiny, tokens
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM, QuantoConfig

from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.kinks import kinks


def flat_gradients(backbone, meta_gradient, batch=3, autocast=False, **kwargs):
    """All gradients of one training step as one vector."""
    torch.manual_seed(1)
    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, train_backbone=True, reconstruction_weight=0.3, **kwargs)
    config.meta_gradient = meta_gradient
    model = get_peft_model(backbone, config)
    model.zero_grad()
    ids = tokens(batch, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, context_input_ids=tokens(batch, 9, seed=2)).loss
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_finite_difference_is_close_to_exact_for_any_batch(batch):
    exact, difference = (flat_gradients(tiny(), name, batch) for name in ("exact", "finite_difference"))
    assert (difference - exact).norm() < 5e-3 * exact.norm()


def test_finite_difference_in_bf16():
    """A random tiny model is smooth and rounds badly, so it needs a long step."""
    exact = flat_gradients(tiny(scale=1.5), "exact")
    difference = flat_gradients(tiny(scale=1.5), "finite_difference", autocast=True, finite_difference_step=0.1)
    first_order = flat_gradients(tiny(scale=1.5), "first_order")
    assert F.cosine_similarity(difference, exact, dim=0) > 0.99
    assert F.cosine_similarity(first_order, exact, dim=0) < 0.9  # there is a second order to get right


def test_a_zero_outer_gradient_gives_a_zero_finite_difference():
    """Where no label counts, v is zero and has no direction."""
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, meta_gradient="finite_difference"))
    output = model(input_ids=tokens(2, 5), context_input_ids=tokens(2, 9))
    (output.logits * 0).sum().backward()
    gradient = model.base_model.slots.gradmem_memory["default"].grad
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_finite_difference_of_a_memory_of_zeros():
    backbone = tiny("gpt2").double()
    config = GradMemConfig(num_memory_tokens=3, meta_gradient="finite_difference", write_lr=0.3, write_steps=1)
    results = []
    for name in ("exact", "finite_difference"):
        config.meta_gradient = name
        model = get_peft_model(copy.deepcopy(backbone), config)
        slots = model.base_model.slots.gradmem_memory["default"]
        with torch.no_grad():
            slots.zero_()
        train_step(model)
        results.append(slots.grad)
    assert relative(results[1], results[0]) < 1e-3


def test_finite_difference_of_a_compiled_backbone():
    plain = flat_gradients(tiny(), "finite_difference")
    backbone = tiny()
    backbone.base_model.compile(backend="aot_eager")
    torch.testing.assert_close(flat_gradients(backbone, "finite_difference"), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("mixtral", r"routes tokens to experts \(MixtralExperts\)"), ("opt", "has ReLU"), ("int8", "quantises its act")],
)
def test_a_loss_with_kinks_gives_one_warning(kind, found):
    """Gradients jump at kinks, so their difference is no curvature."""
    if kind == "mixtral":
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        backbone = MixtralForCausalLM(
            MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **sizes)
        )
    else:
        backbone = tiny("opt" if kind == "opt" else "llama")
    if kind == "int8":
        backbone.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3, meta_gradient="finite_difference"))
    ids = tokens(2, 9)
    with pytest.warns(UserWarning, match=f"has kinks: it {found}.*meta_gradient='exact'"):
        model(input_ids=ids, labels=ids, context_input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids, context_input_ids=ids)


@pytest.mark.parametrize(
    ("quantisation", "of_activations"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), True),
        (BitsAndBytesConfig(load_in_4bit=True), False),
        (QuantoConfig(weights="int8"), False),
        (QuantoConfig(weights="int8", activations="int8"), True),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, False),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationIntxConfig"}}}, True),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": None}}}, False),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, True),
    ],
)
def test_quantised_activations_are_detected(quantisation, of_activations):
    backbone = tiny()
    assert kinks(backbone) == []
    backbone.config.quantization_config = quantisation
    assert kinks(backbone) == ["quantises its activations"] * of_activations
