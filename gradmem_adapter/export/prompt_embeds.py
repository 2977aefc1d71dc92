"""Memory in the format that engines accept over HTTP: input embeddings in base64."""

from __future__ import annotations

import base64
import io

import torch
from peft import PeftModel
from torch import Tensor

from gradmem_adapter.peft_model import GradMemPeftModel
from gradmem_adapter.state import MemoryState


def prompt_embeds(
    model: PeftModel | GradMemPeftModel, memory: MemoryState, dtype: torch.dtype | None = None, *, strict: bool = True
) -> list[str]:
    """States in the format of vLLM's API: what READ puts before a query, in base64.

    Args:
        model (`PeftModel`): the model with the adapter that wrote them; its projection and control vectors are part of
            the memory.
        memory (`MemoryState`): B states.
        dtype (`torch.dtype`, *optional*): bfloat16 halves the length; the engine rounds to its own dtype in any case.
            `None`: the backbone's.
        strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.

    Returns:
        `list[str]`: one text per state.

    Raises:
        ValueError: the states are another model's, or have vectors that are not finite.
    """
    return [encoded(one.to(dtype)) for one in model.prefix_embeddings(memory, strict=strict)]


def encoded(embeddings: Tensor) -> str:
    """Input embeddings `[T, d]` in base64, in PyTorch's file format; `ValueError` if they are not finite."""
    check_sendable(embeddings)
    file = io.BytesIO()
    torch.save(embeddings.detach().cpu().clone(), file)  # of a view, torch.save would write the whole storage
    return base64.b64encode(file.getvalue()).decode("ascii")


def check_sendable(embeddings: Tensor) -> None:
    """Raise `ValueError` for vectors that are not finite: they would spoil an engine's later answers as well."""
    if not embeddings.isfinite().all():
        raise ValueError(
            "The memory has vectors that are not finite, because WRITE diverged. Nothing was sent, since engines keep "
            "such numbers in their caches. Write the context again with a smaller write learning rate."
        )
