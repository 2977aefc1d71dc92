"""Attention that can be differentiated twice, and what is refused because it cannot."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tokens
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmem_adapter import GradMemConfig
from gradmem_adapter.ops.attention import TwiceDifferentiableAttention, double_backward_problem, plain_attention


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
        model(input_ids=tokens(1, 4), context_input_ids=tokens(1, 6))


def test_attention_with_a_double_backward_passes():
    assert double_backward_problem(_good_kernel, torch.float32, "cpu") is None
    assert double_backward_problem(_good_kernel, torch.bfloat16, "cpu") is None
    assert "wrong" in double_backward_problem(_silent_kernel, torch.float32, "cpu")


@pytest.mark.parametrize("case", ["causal", "boolean mask", "additive mask", "gqa", "scale"])
def test_plain_attention_matches_torch(case):
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
