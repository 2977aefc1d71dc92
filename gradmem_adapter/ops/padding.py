"""Padding: rows of tokens as one tensor, tokens right behind them, and means of their parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def append(context: Tensor, lengths: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """`[context; tail; padding]` for each sample, so that a causal model needs no mask.

    Args:
        context: [B, N, ...], right padded; lengths: [B], tokens that count.
        tail: [B, T, ...].

    Returns:
        joined [B, N + T, ...] and places [B, T], where the tail stands.
    """
    n, t = context.shape[1], tail.shape[1]
    place = torch.arange(n + t, device=context.device)
    length = lengths[:, None]
    # Behind the tail comes what was padding: the first padded places of the context.
    source = torch.where(place < length, place, torch.where(place < length + t, place - length + n, place - t))
    index = source.view(*source.shape, *[1] * (context.dim() - 2)).expand(-1, -1, *context.shape[2:])
    return torch.cat([context, tail], dim=1).gather(1, index), length + torch.arange(t, device=context.device)


def part_means(values: Tensor, lengths: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The means of `parts` equal parts of each sample's values, in order.

    Args:
        values: [B, N, d], right padded; lengths: [B], places that count.
        parts: P; a sample of fewer values than this has as many parts as values.

    Returns:
        means [B, P, d], zero behind the last part, and counts [B] of parts.
    """
    places = torch.arange(values.shape[1], device=values.device)
    counts = lengths.clamp(max=parts)
    part = places * counts[:, None] // lengths[:, None]
    which = torch.arange(parts, device=values.device)
    share = (part[:, None] == which[:, None]) & (places < lengths[:, None])[:, None]
    weights = share.to(values.dtype) / share.sum(-1, keepdim=True).clamp(min=1).to(values.dtype)
    return weights @ values, counts


def pad(rows: Sequence[Sequence[int]], side: str, value: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor and its mask, [B, longest] each.

    Pad here and not in the tokenizer, which keeps its padding as state that threads would share.
    """
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=float(value), padding_side=side),
        pad_sequence(masks, batch_first=True, padding_side=side),
    )
