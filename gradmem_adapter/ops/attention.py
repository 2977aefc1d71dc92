"""Attention that can be differentiated twice, for the exact meta-gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmem_adapter.utils.backbone import shallow_copy, uses_checkpointing


class TwiceDifferentiableAttention(TorchFunctionMode):
    """Inside this context, `scaled_dot_product_attention` is computed from plain matrix products and a softmax.

    The fused kernels have no double backward. A function mode affects only the thread that enters it, so other threads
    keep their fast attention. Changing the model's configuration or PyTorch's backend flags would affect them too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return plain_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def recomputed_plainly(backbone: PreTrainedModel) -> PreTrainedModel:
    """A backbone that also uses plain attention where gradient checkpointing recomputes its layers: PyTorch leaves
    function modes during a backward pass.

    Args:
        backbone (`PreTrainedModel`): not changed. Returned as it is without checkpointing, otherwise copied; the copy
            shares its weights.
    """
    if not uses_checkpointing(backbone):
        return backbone
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            copy = copies[module] = shallow_copy(module)
            copy.__dict__["_modules"] = {name: child and copied(child) for name, child in module._modules.items()}
            if run := module.__dict__.get("_gradient_checkpointing_func"):
                copy.__dict__["_gradient_checkpointing_func"] = partial(run, context_fn=_plain_the_second_time)
        return copies[module]

    return cast(PreTrainedModel, copied(backbone))


def _plain_the_second_time() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), TwiceDifferentiableAttention()


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by its definition: softmax(q k^T * scale + mask) v.

    Args:
        query (`Tensor`): `[..., heads, n, e]`.
        key (`Tensor`): `[..., kv_heads, s, e]`.
        value (`Tensor`): `[..., kv_heads, s, e']`.
        attn_mask (`Tensor`, *optional*): boolean (True: attend) or additive, broadcastable to `[..., heads, n, s]`.
        dropout_p (`float`, *optional*, defaults to 0.0): the share of attention weights that is dropped.
        is_causal (`bool`, *optional*, defaults to `False`): position i attends to the positions up to i, and the mask
            is ignored.
        scale (`float`, *optional*, defaults to `e ** -0.5`): the factor of the scores before the softmax.
        enable_gqa (`bool`, *optional*, defaults to `False`): several heads share keys and values.

    Returns:
        `Tensor`: `[..., heads, n, e']`.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = F.dropout(
        torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)), dropout_p
    )
    return weights.to(value.dtype) @ value


CAUSAL = "gradmem_causal"
"""The name of `causal_attention` among the attention implementations of Transformers."""


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal SDPA without a mask, for sequences that are padded on the right only.

    Transformers makes no mask for an implementation without a registered mask function. With "sdpa" it inspects the
    positions to see whether a mask is needed. During CUDA graph capture it cannot, so it always makes one, and
    attention with a mask is slow.

    Args:
        module (`nn.Module`): the calling attention layer; not used.
        query (`Tensor`): `[B, heads, n, e]`, the last n of s positions.
        key (`Tensor`): `[B, kv_heads, s, e]`.
        value (`Tensor`): `[B, kv_heads, s, e']`.
        attention_mask (`Tensor`, *optional*): not used.
        dropout (`float`, *optional*, defaults to 0.0): the share of attention weights that is dropped.
        scaling (`float`, *optional*, defaults to `e ** -0.5`): the factor of the scores before the softmax.

    Returns:
        `[B, n, heads, e']`, and no attention weights.
    """
    grouped = query.shape[1] != key.shape[1]
    # A branch, not an expression: torch.compile resolves it for any length, but cannot pass on a symbolic boolean.
    causal = True if query.shape[2] == key.shape[2] else query.shape[2] > 1
    output = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(CAUSAL, causal_attention)


class _AttentionModule(nn.Module):
    """The attributes that Transformers' attention functions read from the calling module."""

    is_causal = True
    num_key_value_groups = 1
    layer_idx = 0


@lru_cache(maxsize=32)
def double_backward_problem(attention: Callable[..., Any], dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with an attention function's second derivatives, or None.

    Compares the Hessian-vector product of a double backward with a central difference of first gradients on random
    queries, keys and values.

    Args:
        attention (`Callable`): as Transformers registers them in `ALL_ATTENTION_FUNCTIONS`.
        dtype (`torch.dtype`): of queries, keys and values.
        device (`str`): where they are.
    """
    options: Any = {
        "generator": torch.Generator("cpu").manual_seed(0),
        "device": "cpu",
    }  # independent of the default device
    shape = (3, 1, 2, 16, 64)  # (q k v), batch, heads, positions, head size
    inputs, direction = (torch.randn(shape, **options).to(device, dtype) for _ in range(2))
    weights = torch.randn((1, 16, 2, 64), **options).to(device, dtype)

    def gradient(point: Tensor, create_graph: bool) -> Tensor:
        query, key, value = point.unbind()
        # The square makes the gradient that reaches the attention depend on its output, as it does in a model.
        output = attention(_AttentionModule(), query, key, value, None, scaling=0.125, dropout=0.0)[0]
        return torch.autograd.grad((output.square() * weights).sum(), point, create_graph=create_graph)[0]

    def leaf(point: Tensor) -> Tensor:
        return point.detach().requires_grad_()

    with torch.inference_mode(False), torch.enable_grad():
        try:
            point, e = leaf(inputs), 0.1
            twice = torch.autograd.grad((gradient(point, True) * direction).sum(), point)[0]
            above, below = (gradient(leaf(inputs + s * e * direction), False) for s in (1, -1))
        except Exception as error:  # any error of a third-party kernel is a result
            return f"its double backward failed ({type(error).__name__}: {error})"
    cosine = F.cosine_similarity(twice.float().flatten(), (above - below).float().flatten(), dim=0).item()
    return None if cosine > 0.9 else f"its second derivatives are wrong (cosine {cosine:.2f} with finite differences)"
