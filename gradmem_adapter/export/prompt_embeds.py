"""Memory as engines take it over HTTP: input embeddings in base64."""

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
    """States as vLLM's API takes them: what READ puts before a query, as `encoded` by itself.

    Args:
        model (`PeftModel`): with the adapter that wrote them, whose projection and control vectors belong to memory.
        memory (`MemoryState`): B states.
        dtype (`torch.dtype`, *optional*): bfloat16 halves the length, and the engine rounds to its own type in any
            case. `None`: the backbone's.
        strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.

    Returns:
        `list[str]`: one text per state.

    Raises:
        ValueError: states of another model, or with vectors that are not finite.
    """
    return [encoded(one.to(dtype)) for one in model.prefix_embeddings(memory, strict=strict)]


def encoded(embeddings: Tensor) -> str:
    """Input embeddings `[T, d]` in base64, in PyTorch's file format; refused where they are not finite."""
    check_sendable(embeddings)
    file = io.BytesIO()
    torch.save(embeddings.detach().cpu().clone(), file)  # of a view, the whole storage would be written
    return base64.b64encode(file.getvalue()).decode("ascii")


def check_sendable(embeddings: Tensor) -> None:
    """Raise `ValueError` for what would make an engine answer every later request wrongly, too."""
    if not embeddings.isfinite().all():
        raise ValueError(
            "The memory has vectors that are not finite, because WRITE diverged. Nothing was sent, since engines keep "
            "such numbers in their caches. Write the context again with a smaller write learning rate."
        )
