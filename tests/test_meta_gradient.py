"""The meta-gradient against plain autograd through all steps, and what it costs."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import textbook
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmem_adapter import GradMemConfig
from gradmem_adapter.ops.attention import TwiceDifferentiableAttention, double_backward_problem, plain_attention


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def relative(actual, expected):
    """In float64, but normalisation layers and losses of Transformers compute in float32."""
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-2)).item()


def loss64(model, seed=None, **kwargs):
    """The outer loss without the float32 of Transformers' own loss, on a model that is float64 throughout (GPT-2)."""
    if seed is not None:
        torch.manual_seed(seed)
    query = tokens(2, 5, seed=1)
    output = model(input_ids=query, context_input_ids=tokens(2, 9, seed=2), **kwargs)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), query[:, 1:].flatten())
    return loss + model.active_peft_config.reconstruction_weight * output.write_losses[:, -1].mean()


def difference_along_gradient(model, parameter, seed=None, e=1e-5, **kwargs):
    direction = parameter.grad / parameter.grad.norm().clamp(min=1e-30)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * e * direction)
        values.append(loss64(model, seed, **kwargs).item())
        with torch.no_grad():
            parameter.sub_(sign * e * direction)
    return (values[0] - values[1]) / (2 * e)


def train_step(model, **kwargs):
    model.zero_grad()
    inputs = {
        "input_ids": tokens(2, 5, seed=1),
        "labels": tokens(2, 5, seed=1),
        "context_input_ids": tokens(2, 9, seed=2),
    } | kwargs
    output = model(**inputs)
    output.loss.backward()
    return output


@pytest.mark.parametrize(("meta_gradient", "tolerance"), [("exact", 1e-5), ("finite_difference", 2e-3)])
@pytest.mark.parametrize("second_order_steps", [None, 0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_autograd_through_all_steps(architecture, second_order_steps, meta_gradient, tolerance):
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
        memory = textbook.write(reference, initial * 1, c, 3, 0.3, second_order_steps)
        losses.append(textbook.read_loss(reference, memory, q, q))
    torch.stack(losses).mean().backward()

    assert relative(slots.grad, initial.grad) < tolerance
    ours = dict(model.base_model.backbone_parameters())
    for name, parameter in reference.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = torch.zeros_like(parameter) if ours[name].grad is None else ours[name].grad
        assert relative(actual, expected) < tolerance, name


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clip", [{}, {"write_clip_norm": 0.05}])
def test_gradients_of_every_part_equal_differences(optimizer, clip, meta_gradient):
    """Slots, LoRA, write head, control vectors, projection and learned rate, each against a central difference."""
    config = GradMemConfig(
        num_memory_tokens=2, write_steps=2, write_lr=0.1, write_optimizer=optimizer, learn_write_lr="per_element",
        num_write_lrs=2, write_lr_from_end=True, memory_projection="shared", write_head=True,
        num_control_tokens=1, reconstruction_weight=0.3, start="pooled_context",
        lora_config=LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
        meta_gradient=meta_gradient, **clip,
    )  # fmt: skip
    model = get_peft_model(tiny("gpt2", scale=2.0).double(), config)
    with torch.no_grad():
        model.base_model.slots.gradmem_start_gain["default"].normal_(std=0.1)
    loss64(model).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 1 + 2 + 2 + 1 + 4 + 2 + 2 * 2  # slots, gains, rates, head, control vectors, projection, LoRA
    for name in names:
        parameter = model.get_parameter(name)
        assert difference_along_gradient(model, parameter) == pytest.approx(parameter.grad.norm().item(), rel=1e-4), (
            name
        )


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
def test_without_write_steps_the_start_is_what_recites(meta_gradient):
    """The outer loss has the write loss of the memory that WRITE starts from, and its gradient."""
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


def test_first_order_passes_gradients_to_the_slots_unchanged():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, meta_gradient="first_order", write_lr=0.3))
    output = train_step(model)
    state = model.write(tokens(2, 9, seed=2))
    prefix = state.vectors.requires_grad_()
    read = [
        textbook.read_loss(model.get_base_model(), memory, query, query)
        for memory, query in zip(prefix, tokens(2, 5, seed=1), strict=True)
    ]
    torch.stack(read).mean().backward()
    torch.testing.assert_close(model.base_model.slots.gradmem_memory["default"].grad, prefix.grad.sum(0))
    torch.testing.assert_close(output.target_loss, torch.stack(read).mean())


def test_none_trains_no_slots_but_the_reader():
    config = GradMemConfig(
        num_memory_tokens=3, meta_gradient="none", lora_config=LoraConfig(r=2, init_lora_weights=False)
    )
    model = get_peft_model(tiny(), config)
    train_step(model)
    assert model.base_model.slots.gradmem_memory["default"].grad is None
    assert any("lora" in name and value.abs().sum() > 0 for name, value in gradients(model).items())


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
def test_dropout_masks_are_the_same_in_forward_and_backward(meta_gradient):
    """With dropout on, the gradient still is the gradient of the loss that was computed."""
    model = get_peft_model(
        tiny("gpt2", embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3).double(),
        GradMemConfig(num_memory_tokens=2, write_lr=0.3, meta_gradient=meta_gradient),
    )
    model.train()
    slots = model.base_model.slots.gradmem_memory["default"]

    loss64(model, seed=3).backward()
    expected = pytest.approx(slots.grad.norm().item(), rel=1e-4)
    assert difference_along_gradient(model, slots, seed=3) == expected
    assert difference_along_gradient(model, slots, seed=4) != expected  # other masks, another loss


def test_autocast_is_the_same_in_forward_and_backward():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2, write_lr=0.3, train_backbone=True))
    train_step(model)
    full = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            input_ids=tokens(2, 5, seed=1), labels=tokens(2, 5, seed=1), context_input_ids=tokens(2, 9, seed=2)
        )
    model.zero_grad()
    output.loss.backward()
    half = gradients(model)
    flat = [torch.cat([g[name].flatten() for name in full]) for g in (full, half)]
    assert F.cosine_similarity(*flat, dim=0) > 0.9
    assert not torch.equal(*flat)


class _NotTwiceDifferentiable(torch.autograd.Function):
    """Attention whose backward works on plain numbers, as a Triton kernel's does: silently wrong second derivatives."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return plain_attention(query, key, value, is_causal=True)

    @staticmethod
    def backward(ctx, cotangent):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            output = plain_attention(*leaves, is_causal=True)
        # A graph back to the cotangent alone: the dependence on query, key and value is lost without an error.
        gradients = torch.autograd.grad(output, leaves, cotangent.detach())
        scale = cotangent.sum() / cotangent.detach().sum()
        return tuple(g * scale for g in gradients)


def _silent_kernel(module, query, key, value, attention_mask, **kwargs):
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _NotTwiceDifferentiable.apply(query, key, value).transpose(1, 2), None


def _good_kernel(module, query, key, value, attention_mask, **kwargs):
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return plain_attention(query, key, value, is_causal=True, scale=kwargs.get("scaling")).transpose(1, 2), None


def test_attention_without_a_double_backward_is_refused(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "silent_kernel", _silent_kernel)
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2))
    model.get_base_model().config._attn_implementation = "silent_kernel"
    model.write(tokens(1, 6))  # first order is right, so WRITE works
    with pytest.raises(NotImplementedError, match=r"silent_kernel.*second derivatives are wrong.*sdpa"):
        train_step(model)


def test_attention_with_a_double_backward_passes():
    assert double_backward_problem(_good_kernel, torch.float32, "cpu") is None
    assert double_backward_problem(_good_kernel, torch.bfloat16, "cpu") is None
    assert "wrong" in double_backward_problem(_silent_kernel, torch.float32, "cpu")


@pytest.mark.parametrize("case", ["causal", "boolean mask", "additive mask", "gqa", "scale"])
def test_plain_attention_equals_torch(case):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    kwargs = {
        "causal": {"is_causal": True},
        "boolean mask": {"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril()},
        "additive mask": {"attn_mask": torch.randn(2, 1, 7, 7)},
        "gqa": {"enable_gqa": True, "is_causal": True},
        "scale": {"scale": 0.7},
    }[case]
    if case == "gqa":
        k, v = k[:, :2], v[:, :2]
    expected = F.scaled_dot_product_attention(q, k, v, **kwargs)
    with TwiceDifferentiableAttention():
        actual = F.scaled_dot_product_attention(q, k, v, **kwargs)
    torch.testing.assert_close(actual, expected)


_PEAK = r"""
import re, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from peft import get_peft_model
from tiny import tiny, tokens
from gradmem_adapter import GradMemConfig
torch.set_num_threads(1)


def peak():
    # Of this program alone; getrusage would start at the peak of the process that started it.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


model = get_peft_model(
    tiny(num_hidden_layers=6, hidden_size=128, intermediate_size=256, max_position_embeddings=512, scale=1.0),
    GradMemConfig(
        num_memory_tokens=8, write_steps=int(sys.argv[1]), write_lr=0.1, train_backbone=True, meta_gradient=sys.argv[2]
    ),
)
base = peak()
ids = tokens(4, 400)
model(input_ids=ids[:, :8], labels=ids[:, :8], context_input_ids=ids).loss.backward()
print(peak() - base)
"""


def peak_kib(steps, meta_gradient):
    command, root = [sys.executable, "-c", _PEAK, str(steps), meta_gradient], Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
def test_memory_of_a_training_step_does_not_grow_with_the_write_steps(meta_gradient):
    """What the process takes beyond the loaded model: stricter than the whole process's peak."""
    one, six = peak_kib(1, meta_gradient), peak_kib(6, meta_gradient)
    assert one > 50_000  # KiB; there is something to compare
    assert six < 1.25 * one, (one, six)
