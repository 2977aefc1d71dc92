"""Every strategy against plain autograd through all steps, and against differences of the outer loss."""

import copy

import pytest
import torch
from outer import difference_along_gradient, gradients, loss64, relative, train_step
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens

from benchmarks import textbook
from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.parameters import backbone_parameters


@pytest.mark.parametrize(("meta_gradient", "tolerance"), [("exact", 1e-5), ("finite_difference", 2e-3)])
@pytest.mark.parametrize("second_order_steps", [None, 0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_meta_gradients_equal_autograd_through_all_steps(architecture, second_order_steps, meta_gradient, tolerance):
    backbone = tiny(architecture, attn_implementation="eager").double()
    config = GradMemConfig(
        num_memory_tokens=3, write_steps=3, write_lr=0.3, train_backbone=True, meta_gradient=meta_gradient,
        second_order_steps=second_order_steps,
    )  # fmt: skip
    reference = copy.deepcopy(backbone)
    model = get_peft_model(backbone, config)
    slots = model.base_model.slots.gradmem_memory["default"]
    context, query = tokens(2, 9, seed=2), tokens(2, 5, seed=1)

    train_step(model)
    initial = slots.detach().clone().requires_grad_()
    losses = []
    for c, q in zip(context, query, strict=True):
        memory = textbook.write(reference, initial, c[None], 3, 0.3, second_order_steps)
        losses.append(textbook.loss(reference, memory, q[None]))
    torch.cat(losses).mean().backward()

    assert relative(slots.grad, initial.grad) < tolerance
    ours = dict(backbone_parameters(model.get_base_model()))
    for name, parameter in reference.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = torch.zeros_like(parameter) if ours[name].grad is None else ours[name].grad
        assert relative(actual, expected) < tolerance, name


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clip", [{}, {"write_clip_norm": 0.05}])
def test_gradients_of_every_part_match_central_differences(optimizer, clip, meta_gradient):
    """Slots, LoRA, write head, control vectors, projection and learned rate, each against a central difference."""
    config = GradMemConfig(
        num_memory_tokens=2, write_steps=2, write_lr=0.1, write_optimizer=optimizer, learn_write_lr="per_element",
        num_write_lrs=2, memory_projection="shared", write_head=True,
        num_control_tokens=1, reconstruction_weight=0.3, start="pooled_context",
        lora_config=LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
        meta_gradient=meta_gradient, **clip,
    )  # fmt: skip
    model = get_peft_model(tiny("gpt2", scale=2.0).double(), config)
    with torch.no_grad():
        model.base_model.slots.gradmem_start_gain["default"].normal_(std=0.1)
    loss64(model).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 1 + 2 + 1 + 1 + 4 + 2 + 2 * 2  # slots, gains, rates, head, control vectors, projection, LoRA
    for name in names:
        parameter = model.get_parameter(name)
        assert difference_along_gradient(model, parameter) == pytest.approx(parameter.grad.norm().item(), rel=1e-4), (
            name
        )


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
def test_without_write_steps_the_start_has_the_write_loss(meta_gradient):
    """The outer loss includes the write loss of the memory that WRITE starts from, and its gradient."""
    config = GradMemConfig(
        num_memory_tokens=2, start="pooled_context", reconstruction_weight=0.3,
        meta_gradient=meta_gradient, train_backbone=True,
    )  # fmt: skip
    model = get_peft_model(tiny("gpt2", scale=2.0).double(), config)
    context, query = tokens(2, 9, seed=2), tokens(2, 5, seed=1)
    output = model(query, labels=query, context_input_ids=context, write_steps=0)
    start = model.write(context, steps=0)
    torch.testing.assert_close(output.write_losses.float(), start.write_losses)
    expected = output.target_loss + 0.3 * output.write_losses.mean()
    torch.testing.assert_close(output.loss, expected)
    loss64(model, write_steps=0).backward()
    for name in ("gradmem_memory", "gradmem_pool_gain", "gradmem_start_gain"):
        parameter = getattr(model.base_model.slots, name)["default"]
        numeric = difference_along_gradient(model, parameter, write_steps=0)
        assert numeric == pytest.approx(parameter.grad.norm().item(), rel=1e-4), name


def test_fused_and_plain_attention_give_the_same_meta_gradient():
    results = []
    for attention in ("sdpa", "eager"):
        model = get_peft_model(
            tiny(attn_implementation=attention),
            GradMemConfig(num_memory_tokens=3, write_lr=0.3, train_backbone=True),
        )
        torch.manual_seed(1)
        with torch.no_grad():
            model.base_model.slots.gradmem_memory["default"].normal_()
        train_step(model)
        results.append(gradients(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


def test_first_order_passes_gradients_to_the_slots_unchanged():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, meta_gradient="first_order", write_lr=0.3))
    output = train_step(model)
    state = model.write(tokens(2, 9, seed=2))
    prefix = state.vectors.requires_grad_()
    read = textbook.loss(model.get_base_model(), prefix, tokens(2, 5, seed=1))
    read.mean().backward()
    torch.testing.assert_close(model.base_model.slots.gradmem_memory["default"].grad, prefix.grad.sum(0))
    torch.testing.assert_close(output.target_loss, read.mean())


@pytest.mark.parametrize("start", ["slots", "pooled_context"])
def test_none_trains_only_the_reader(start):
    config = GradMemConfig(
        num_memory_tokens=3, meta_gradient="none", learn_write_lr="per_element", start=start,
        lora_config=LoraConfig(r=2, init_lora_weights=False),
    )  # fmt: skip
    model = get_peft_model(tiny(), config)
    train_step(model)
    assert not [name for name in gradients(model) if "gradmem" in name]
    assert any("lora" in name and value.abs().sum() > 0 for name, value in gradients(model).items())
