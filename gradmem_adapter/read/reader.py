"""READ as a protocol: the model or engine that answers from `[memory; query]`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from gradmem_adapter.state import MemoryState


class Reader(Protocol):
    """Answers from `[memory; query]`: the model itself, with Transformers, or an engine that serves it."""

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, memory: MemoryState, **options: Any) -> Any:
        """Answer prompts from memory.

        Args:
            input_ids (`Tensor`): `[B, T]` prompts.
            attention_mask (`Tensor`): `[B, T]`, padding on either side.
            memory (`MemoryState`): one state for all prompts or one per prompt.
            options: arguments of `model.generate`, as far as the reader supports them; others are refused.

        Returns:
            What Transformers returns: prompts and new tokens `[B, T + new]`.
        """
        ...
