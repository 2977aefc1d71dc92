"""The contexts that WRITE reads: checked token ids, padded on the right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_adapter.ops.padding import move_padding_right
from gradmem_adapter.utils.capture import capturing


class Context(NamedTuple):
    """A batch of contexts, right padded: `input_ids` [B, N], `lengths` [B] (tokens that count)."""

    input_ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, N], True where a token counts."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]


def right_padded(input_ids: Tensor, attention_mask: Tensor | None) -> Context:
    """Contexts with padding wherever it was, moved to the right.

    Args:
        input_ids: [B, N]; attention_mask: [B, N], 1 where a token counts, or None where all do.
    """
    return Context(*move_padding_right(input_ids, attention_mask))


def check_context(input_ids: Tensor, attention_mask: Tensor | None, prefix_length: int, positions: int | None) -> None:
    """Raise `ValueError` unless every context has a token and fits behind the prefix in the model's positions."""
    if len(input_ids) == 0:
        raise ValueError("There is no context to write: input_ids has batch size 0.")
    if capturing():
        return
    lengths = (
        attention_mask.bool().sum(1)
        if attention_mask is not None
        else torch.full((len(input_ids),), input_ids.shape[1])
    )
    if (lengths == 0).any():
        empty = ", ".join(str(i) for i in (lengths == 0).nonzero().flatten().tolist())
        raise ValueError(f"Context {empty} is empty: there is nothing to write. Leave it out of the batch.")
    if positions is not None and int(lengths.max()) + prefix_length > positions:
        raise ValueError(
            f"Context {int(lengths.argmax())} has {int(lengths.max())} tokens, and at most {positions - prefix_length} "
            f"are allowed: the model has {positions} positions, {prefix_length} of them for the memory. Split it, "
            "write the parts as separate contexts and join their states with MemoryState.concat."
        )
