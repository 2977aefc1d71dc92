"""Cross entropy from hidden states, a few positions at a time, so that the logits of all positions are never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26
"""How many logits are held at once (256 MiB in float32); longer contexts are done in chunks."""
MAX_LOGITS_IN_CACHE = 3 * 2**21
"""The same on a CPU where nothing is computed twice (24 MiB): less is given the same memory again and again."""

Head: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states [B, n, h] to logits [B, n, V]."""
Slope: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`losses_and_slope`."""


def token_losses(
    hidden: Tensor, targets: Tensor, mask: Tensor, head: Head, vocabulary: int, once: Slope | None
) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over each sample's tokens, and how many tokens are the first choice.

    Args:
        hidden: [B, N, h], the states that predict the targets.
        targets: [B, N]; mask: [B, N], True where a target counts.
        vocabulary: V, the number of logits of a position.
        once: `losses_and_slope` (or the same, compiled): `hidden` is differentiated once and the head is not, so that
            the gradient is computed while the logits are there. None: everything may be differentiated, any number of
            times, and the logits are computed again in the backward pass.

    Returns:
        losses [B] and first choices [B].
    """
    grad = torch.is_grad_enabled()
    in_cache = hidden.device.type == "cpu" and (once or not grad)
    limit = min(MAX_LOGITS, MAX_LOGITS_IN_CACHE) if in_cache else MAX_LOGITS
    size = max(1, limit // (len(hidden) * vocabulary))
    if once and grad:
        return _OnceDifferentiable.apply(hidden, targets, mask, head, once, size)
    pieces = _split(hidden, targets, mask, size)
    if size >= hidden.shape[1] or not grad:
        sums = [_losses(head, *piece) for piece in pieces]
    else:
        sums = [checkpoint(_losses, head, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    losses, hits = zip(*sums, strict=True)
    return torch.stack(losses).sum(0), torch.stack(hits).sum(0)


def _split(hidden: Tensor, targets: Tensor, mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    parts = (part.split(size, 1) for part in (hidden, targets, mask))
    return ((piece.contiguous(), target, counts) for piece, target, counts in zip(*parts, strict=True))


def _losses(head: Head, hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    hits = (logits.detach().argmax(-1) == targets) & mask
    return nll.masked_fill(~mask, 0).sum(-1), hits.sum(-1)


def losses_and_slope(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], first choices [B], and the losses' derivative for the logits: softmax minus one at the target."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=wide)
    nll = -log_probabilities.gather(-1, targets[..., None])[..., 0].masked_fill(~mask, 0).sum(-1)
    hits = ((logits.argmax(-1) == targets) & mask).sum(-1)
    slope = log_probabilities.exp_().scatter_add_(
        -1, targets[..., None], -torch.ones_like(targets, dtype=wide)[..., None]
    )
    return nll, hits, (slope * mask[..., None]).to(logits.dtype)


class _OnceDifferentiable(torch.autograd.Function):
    """The gradient of each sample's loss for its hidden states, found on the way forward.

    Samples do not interact, so the backward pass has but to scale each sample's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, mask: Tensor, head: Head, slope_of: Slope, size: int
    ) -> tuple[Tensor, Tensor]:
        gradients: list[Tensor] = []
        sums = []
        for piece, target, counts in _split(hidden, targets, mask, size):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                logits = head(leaf)
            *loss_and_hits, slope = slope_of(logits.detach(), target, counts)
            gradients += torch.autograd.grad(logits, leaf, slope)
            sums.append(loss_and_hits)
        ctx.save_for_backward(torch.cat(gradients, dim=1))
        losses, hits = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * cotangent[:, None, None].to(gradient.dtype), None, None, None, None, None
