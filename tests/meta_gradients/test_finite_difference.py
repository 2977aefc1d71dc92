"""The finite difference: how close it is to the exact meta-gradient, and what has no direction or scale."""

import copy

import pytest
import torch
from outer import relative, train_step
from peft import get_peft_model
from tiny import tiny, tokens
from torch.nn import functional as F

from gradmem_adapter import GradMemConfig


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
    """A random tiny model is smooth and rounds badly, so it wants a long step."""
    exact = flat_gradients(tiny(scale=1.5), "exact")
    difference = flat_gradients(tiny(scale=1.5), "finite_difference", autocast=True, finite_difference_step=0.1)
    first_order = flat_gradients(tiny(scale=1.5), "first_order")
    assert F.cosine_similarity(difference, exact, dim=0) > 0.99
    assert F.cosine_similarity(first_order, exact, dim=0) < 0.9  # there is a second order to get right


def test_finite_difference_without_an_outer_gradient_is_zero_and_finite():
    """Where no label counts v is zero, and a direction cannot be made of it."""
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
