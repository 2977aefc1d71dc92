"""The contexts that WRITE reads: checked token ids, padded on the right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.ops.padding import move_padding_right
from gradmem_adapter.utils.backbone import device_of, max_positions
from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.tokens import as_long, check_tokens
from gradmem_adapter.utils.wording import counted, number_of


class Context(NamedTuple):
    """A batch of contexts, right padded.

    Args:
        input_ids (`Tensor`): `[B, N]` token ids.
        lengths (`Tensor`): `[B]`, how many tokens of each context count.
    """

    input_ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """`[B, N]`, True where a token counts."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def split(self, rows: int) -> list[Context]:
        """The same contexts, at most `rows` at a time."""
        return [Context(*part) for part in zip(self.input_ids.split(rows), self.lengths.split(rows), strict=True)]

    @classmethod
    def from_tokens(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        backbone: PreTrainedModel,
        prefix_length: int,
        name: str = "input_ids",
    ) -> Context:
        """Contexts from token ids with padding on either side.

        Args:
            input_ids (`Tensor`): `[B, N]` token ids.
            attention_mask (`Tensor`, *optional*): `[B, N]`, 1 where a token counts. `None`: all do.
            backbone (`PreTrainedModel`): the model whose tokens they are; the contexts are moved to its device.
            prefix_length (`int`): how many of the backbone's positions the memory takes.
            name (`str`, *optional*, defaults to `"input_ids"`): the caller's name for the ids, for messages.

        Raises:
            TypeError: the ids are not a tensor of integers.
            ValueError: an id is not in the model's vocabulary, or a context is empty or too long.
        """
        check_contexts(input_ids, attention_mask, backbone, prefix_length, name)
        device = device_of(backbone)
        mask = None if attention_mask is None else attention_mask.to(device)
        return cls(*move_padding_right(as_long(input_ids).to(device), mask))


def check_contexts(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    backbone: PreTrainedModel,
    prefix_length: int,
    name: str = "input_ids",
) -> None:
    """Raise for contexts that cannot be written; arguments and errors are those of `Context.from_tokens`."""
    check_tokens(name, input_ids, attention_mask, backbone)
    if len(input_ids) == 0:
        raise ValueError("There is no context to write: input_ids has batch size 0.")
    if not capturing():
        batch, width = input_ids.shape
        lengths = [width] * batch if attention_mask is None else attention_mask.bool().sum(1).tolist()
        _check_lengths(lengths, max_positions(backbone), prefix_length)


def _check_lengths(lengths: list[int], positions: int | None, prefix_length: int) -> None:
    if empty := [str(number_of(i)) for i, length in enumerate(lengths) if not length]:
        raise ValueError(f"Context {', '.join(empty)} is empty: there is nothing to write. Leave it out of the batch.")
    longest = max(lengths)
    if positions is not None and longest + prefix_length > positions:
        raise ValueError(
            f"Context {number_of(lengths.index(longest))} has {counted(longest, 'token')}, but at most "
            f"{max(0, positions - prefix_length)} are allowed: the model has {positions} positions, {prefix_length} of "
            "them for the memory. Split it, write the parts as separate contexts and join their states with "
            "MemoryState.concat."
        )
