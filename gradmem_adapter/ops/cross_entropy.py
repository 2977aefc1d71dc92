"""Cross entropy from hidden states, a few positions at a time, so that the logits of all positions are never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

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
IGNORED = -100
"""The label of a token that no loss counts, as in Transformers."""


class Once(NamedTuple):
    """Cross entropy for hidden states that are differentiated at most once, by a head that is not.

    Both take logits [B, n, V], targets [B, n], a mask [B, n], True where a target counts, and whether first choices are
    wanted.
    """

    losses: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    """Losses [B] and first choices [B]."""
    losses_and_slope: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None, Tensor]]
    """The same, and the losses' derivative for the logits: softmax minus one at the target."""

    @classmethod
    def compiled(cls) -> Once:
        """For a GPU, where operations on logits are bound by how often these are read and written."""
        return cls(torch.compile(losses, dynamic=True), torch.compile(_fusable_losses_and_slope, dynamic=True))


def token_losses(
    hidden: Tensor, targets: Tensor, mask: Tensor, head: Head, vocabulary: int, once: Once | None, first: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy summed over each sample's tokens, and how many tokens are the first choice.

    Args:
        hidden: [B, N, h], the states that predict the targets.
        targets: [B, N]; mask: [B, N], True where a target counts.
        vocabulary: V, the number of logits of a position.
        once: `hidden` is differentiated once and the head is not, so that the gradient is computed while the logits are
            there. None: everything may be differentiated, any number of times, and the logits are computed again in
            the backward pass.
        first: count the first choices, which reads all logits once more.

    Returns:
        losses [B] and first choices [B], or None.
    """
    grad = torch.is_grad_enabled()
    in_cache = hidden.device.type == "cpu" and (once or not grad)
    limit = min(MAX_LOGITS, MAX_LOGITS_IN_CACHE) if in_cache else MAX_LOGITS
    size = max(1, limit // (len(hidden) * vocabulary))
    if once and grad:
        return _OnceDifferentiable.apply(hidden, targets, mask, head, once, size, first)
    pieces = _split(hidden, targets, mask, size)
    of_logits = once.losses if once else losses

    def piece_losses(hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return of_logits(head(hidden), targets, mask, first)

    if size >= hidden.shape[1] or not grad:
        sums = [piece_losses(*piece) for piece in pieces]
    else:
        sums = [checkpoint(piece_losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    nll, hits = zip(*sums, strict=True)
    return torch.stack(nll).sum(0), torch.stack(hits).sum(0) if first else None


def target_losses(
    hidden: Tensor, labels: Tensor, most: int, head: Head, vocabulary: int, once: Once | None
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the tokens with a label, and for each row whether all of them are the first choice.

    Of a query and its target most positions have no label: the head sees only those that have one.

    Args:
        hidden: [B, T, h], the last hidden states; the one before a token predicts it.
        labels: [B, T], `IGNORED` where no loss counts.
        most: of a row, at most so many labels count.

    Returns:
        a scalar and [B].
    """
    counts = labels != IGNORED
    places = counts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    mask, targets = counts.gather(1, places), labels.gather(1, places).clamp(min=0)
    before = (places - 1).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    nll, hits = token_losses(hidden.gather(1, before), targets, mask, head, vocabulary, once)
    assert hits is not None  # for the type checker
    return nll.sum() / mask.sum(), hits == mask.sum(1)


def _split(hidden: Tensor, targets: Tensor, mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    pieces = max(1, -(-hidden.shape[1] // size))  # of about one length: a short last piece takes nearly as long
    parts = (part.chunk(pieces, 1) for part in (hidden, targets, mask))
    return ((piece.contiguous(), target, counts) for piece, target, counts in zip(*parts, strict=True))


def losses(logits: Tensor, targets: Tensor, mask: Tensor, first: bool = True) -> tuple[Tensor, Tensor | None]:
    """Losses [B] and first choices [B] of logits [B, n, V]; may be differentiated any number of times."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return nll.masked_fill(~mask, 0).sum(-1), first_choices(logits, targets, mask) if first else None


def first_choices(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """How many targets of each sample [B] have the largest of their logits [B, n, V]."""
    return ((logits.detach().argmax(-1) == targets) & mask).sum(-1)


def losses_and_slope(
    logits: Tensor, targets: Tensor, mask: Tensor, first: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`Once.losses_and_slope`, in place as far as that goes."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=wide)
    nll = -log_probabilities.gather(-1, targets[..., None])[..., 0].masked_fill(~mask, 0).sum(-1)
    hits = first_choices(logits, targets, mask) if first else None
    slope = log_probabilities.exp_().scatter_add_(
        -1, targets[..., None], -torch.ones_like(targets, dtype=wide)[..., None]
    )
    return nll, hits, (slope * mask[..., None]).to(logits.dtype)


def _fusable_losses_and_slope(
    logits: Tensor, targets: Tensor, mask: Tensor, first: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same without a scatter, which a compiler cannot fuse: compiled, nothing of the logits' size is written but
    the slope; not compiled, it would be slower."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(-1, keepdim=True)
    nll = (normaliser - wide.gather(-1, targets[..., None]))[..., 0].masked_fill(~mask, 0).sum(-1)
    hits = first_choices(logits, targets, mask) if first else None
    at_target = torch.arange(logits.shape[-1], device=logits.device) == targets[..., None]
    return nll, hits, (((wide - normaliser).exp() - at_target) * mask[..., None]).to(logits.dtype)


PLAIN = Once(losses, losses_and_slope)


class _OnceDifferentiable(torch.autograd.Function):
    """The gradient of each sample's loss for its hidden states, found on the way forward.

    Samples do not interact, so the backward pass has but to scale each sample's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, mask: Tensor, head: Head, once: Once, size: int, first: bool
    ) -> tuple[Tensor, Tensor | None]:
        gradients: list[Tensor] = []
        sums = []
        for piece, target, counts in _split(hidden, targets, mask, size):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                logits = head(leaf)
            *loss_and_hits, slope = once.losses_and_slope(logits.detach(), target, counts, first)
            gradients += torch.autograd.grad(logits, leaf, slope)
            sums.append(loss_and_hits)
        ctx.save_for_backward(torch.cat(gradients, dim=1))
        nll, hits = zip(*sums, strict=True)
        found = torch.stack(hits).sum(0) if first else None
        if found is not None:
            ctx.mark_non_differentiable(found)
        return torch.stack(nll).sum(0), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * cotangent[:, None, None].to(gradient.dtype), None, None, None, None, None, None
