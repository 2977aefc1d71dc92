"""All padding, in one place: stack rows, move padding, append tokens to padded rows, average parts of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradmem_adapter.utils.capture import capturing


def pad(rows: Sequence[Sequence[int] | Tensor], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, and its mask.

    Pad token ids here and not in the tokenizer, which keeps its padding as state that threads would share.

    Args:
        rows (`Sequence`): B rows, token ids `[n]` or tensors `[n, ...]`.
        side (`str`): where the padding goes, `"left"` or `"right"`.
        value (`int`, *optional*, defaults to 0): what to pad with.

    Returns:
        Rows `[B, N, ...]`, N being the longest, and a mask of integers `[B, N]`, 1 where a position counts.
    """
    tensors = [row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in tensors]
    return (
        pad_sequence(tensors, batch_first=True, padding_value=float(value), padding_side=side),
        pad_sequence(masks, batch_first=True, padding_side=side),
    )


def move_padding_right(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move the padding of rows, wherever it is, to the right.

    Args:
        input_ids (`Tensor`): `[B, N]`.
        attention_mask (`Tensor`, *optional*): `[B, N]`, 1 where a token counts; each row needs at least one. `None`:
            all do.

    Returns:
        Rows `[B, longest]`, padded with their first token, and their lengths `[B]`. Not with the pad token: its
        embedding may be zeros, where norms have no second derivative.
    """
    if attention_mask is None:
        return input_ids, torch.full_like(input_ids[:, 0], input_ids.shape[1])
    mask = attention_mask.bool()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    lengths = mask.sum(1)
    longest = input_ids.shape[1] if capturing() else int(lengths.max())
    moved = input_ids.gather(1, order)[:, :longest]
    counts = torch.arange(longest, device=mask.device) < lengths[:, None]
    return torch.where(counts, moved, moved[:, :1]), lengths


def move_padding_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding on the right of rows to the left; the other positions keep their order.

    Args:
        input_ids (`Tensor`): `[B, N]`.
        attention_mask (`Tensor`): `[B, N]`, 1 where a token counts.

    Returns:
        Rows `[B, N]`, and their mask `[B, N]`.
    """
    right = (attention_mask.flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    width = max(1, input_ids.shape[1])
    source = (torch.arange(input_ids.shape[1], device=input_ids.device) - right) % width
    return input_ids.gather(1, source), attention_mask.gather(1, source)


def append(rows: Tensor, lengths: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Append a tail to each padded row, `[row; tail; padding]`, so that a causal model needs no mask.

    Args:
        rows (`Tensor`): `[B, N, ...]`, right padded.
        lengths (`Tensor`): `[B]`, the number of positions that count.
        tail (`Tensor`): `[B, T, ...]`.

    Returns:
        Rows `[B, N + T, ...]`, and the positions `[B, T]` of the tail.
    """
    n, t = rows.shape[1], tail.shape[1]
    place = torch.arange(n + t, device=rows.device)
    length = lengths[:, None]
    # The row's own padding follows the tail.
    source = torch.where(place < length, place, torch.where(place < length + t, place - length + n, place - t))
    index = source.view(*source.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return torch.cat([rows, tail], dim=1).gather(1, index), length + torch.arange(t, device=rows.device)


def part_means(values: Tensor, lengths: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The means of equal parts of each sample's values, in order.

    Args:
        values (`Tensor`): `[B, N, d]`, right padded.
        lengths (`Tensor`): `[B]`, the number of positions that count.
        parts (`int`): P; a sample with fewer values has one part per value.

    Returns:
        Means `[B, P, d]`, zero after the last part, and the number of parts `[B]`.
    """
    places = torch.arange(values.shape[1], device=values.device)
    counts = lengths.clamp(max=parts)
    part = places * counts[:, None] // lengths[:, None]
    which = torch.arange(parts, device=values.device)
    share = (part[:, None] == which[:, None]) & (places < lengths[:, None])[:, None]
    weights = share.to(values.dtype) / share.sum(-1, keepdim=True).clamp(min=1).to(values.dtype)
    return weights @ values, counts
