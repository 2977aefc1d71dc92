"""READ as a protocol: who answers from `[memory; query]`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from gradmem_adapter.state import MemoryState


class Reader(Protocol):
    """Who answers from `[memory; query]`: a model with memory itself, by Transformers, or an engine that serves it."""

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, memory: MemoryState, **options: Any) -> Any:
        """Answer prompts from memory.

        Args:
            input_ids (`Tensor`): `[B, T]` prompts.
            attention_mask (`Tensor`): `[B, T]`, padding on either side.
            memory (`MemoryState`): one state for all prompts or one per prompt.
            options: what `model.generate` takes, as far as the reader knows it; others are refused.

        Returns:
            What Transformers returns: prompts and new tokens `[B, T + new]`.
        """
        ...
