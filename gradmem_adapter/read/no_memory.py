"""Answers without memory: those of the backbone alone, as if it had no adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.lora import without_lora
from gradmem_adapter.read.cache_memory import tie_caches
from gradmem_adapter.read.left_padding import check_left_padding
from gradmem_adapter.read.prefix import check_queries


def generate_without_memory(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, strict: bool = True,
    context_index: Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Transformers' `generate` with the backbone alone. Other threads see no change of the model.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        input_ids (`Tensor`): `[B, T]`, prompts.
        attention_mask (`Tensor`): `[B, T]`, padding on the left.
        strict (`bool`, *optional*, defaults to `True`): refuse a cache that was made with a memory.
        context_index (`Tensor`, *optional*): None, as there is no memory.
        options: further arguments of Transformers' `generate`.

    Raises:
        ValueError: there is no prompt, a prompt has no token, a `context_index` is given, or a cache was made with a
            memory.
        NotImplementedError: the backbone would read padding as text.
    """
    if context_index is not None:
        raise ValueError("context_index needs a memory. Pass memory=..., or leave context_index out.")
    check_queries(len(input_ids))
    if empty := (~attention_mask.any(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"Prompt {', '.join(map(str, empty))} has no tokens, and without memory there is nothing to answer from. "
            "Leave it out, or pass a memory."
        )
    tie_caches(options, None, strict)
    check_left_padding(backbone, not attention_mask.all())
    return without_lora(backbone).generate(input_ids, attention_mask=attention_mask, **options)  # type: ignore[operator]
