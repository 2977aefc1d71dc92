"""Cross entropy from hidden states, in chunks of positions, so that the logits of all positions are never held at
once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26
"""How many logits are held at once (256 MiB in float32); longer contexts are processed in chunks."""
MAX_LOGITS_IN_CACHE = 3 * 2**21
"""The same for a CPU where nothing is recomputed (24 MiB): chunks this small reuse the same memory."""

Head: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states `[B, n, h]` to logits `[B, n, V]`."""
IGNORED = -100
"""The label of a token that losses ignore, as in Transformers."""


class FusedCrossEntropy(NamedTuple):
    """Cross entropy that computes its gradient in the forward pass, while the logits exist (as Liger's fused linear
    cross entropy does). The hidden states may be differentiated at most once, and the head not at all.

    Both functions take logits `[B, n, V]`, targets `[B, n]`, a mask `[B, n]` (True where a target counts) and whether
    to count the targets that the model ranks first.

    Args:
        nll (`Callable`): returns negative log-likelihoods `[B]` and counts `[B]` (or `None`).
        nll_and_gradient (`Callable`): returns the same and the gradient for the logits: softmax minus one at the
            target.
    """

    nll: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    nll_and_gradient: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None, Tensor]]

    @classmethod
    @cache
    def compiled(cls) -> FusedCrossEntropy:
        """For a GPU, where operations on logits are limited by memory bandwidth."""
        return cls(
            torch.compile(nll_of_logits, dynamic=True), torch.compile(_compilable_nll_and_gradient, dynamic=True)
        )


def sequence_nll(
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    head: Head,
    vocabulary: int,
    fused: FusedCrossEntropy | None = None,
    count_correct: bool = True,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The negative log-likelihood of each sequence, summed over its tokens, and how many tokens are first choices.

    Args:
        hidden (`Tensor`): `[B, N, h]`, the states that predict the targets.
        targets (`Tensor`): `[B, N]`, token ids.
        mask (`Tensor`): booleans `[B, N]`, True where a target counts.
        head (`Callable`): from hidden states to logits.
        vocabulary (`int`): V, the number of logits of a position.
        fused (`FusedCrossEntropy`, *optional*): pass it if `hidden` is differentiated at most once and the head is not.
            `None`: everything may be differentiated any number of times, and the logits are recomputed in the backward
            pass.
        count_correct (`bool`, *optional*, defaults to `True`): count the tokens that have the largest logit, which
            takes one more read of all logits.
        compiled (`bool`, *optional*, defaults to `False`): on a GPU, compile the operations on logits, which then
            cannot be differentiated twice.

    Returns:
        Negative log-likelihoods `[B]`, and counts `[B]` or `None`.
    """
    grad = torch.is_grad_enabled()
    limit = max_logits(hidden.device) if fused or not grad else MAX_LOGITS
    size = max(1, limit // (len(hidden) * vocabulary))
    chosen = FusedCrossEntropy.compiled() if compiled and hidden.is_cuda else fused or FUSED
    if fused and grad:
        return _GradientInForward.apply(hidden, targets, mask, head, chosen, size, count_correct)
    chunks = _chunks(hidden, targets, mask, size)

    def chunk_nll(hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return chosen.nll(head(hidden), targets, mask, count_correct)

    if size >= hidden.shape[1] or not grad:
        sums = [chunk_nll(*chunk) for chunk in chunks]
    else:
        sums = [checkpoint(chunk_nll, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    nll, correct = zip(*sums, strict=True)
    return torch.stack(nll).sum(0), torch.stack(correct).sum(0) if count_correct else None


def max_logits(device: torch.device) -> int:
    """How many logits are held at once where nothing is recomputed."""
    return min(MAX_LOGITS, MAX_LOGITS_IN_CACHE) if device.type == "cpu" else MAX_LOGITS


def _chunks(hidden: Tensor, targets: Tensor, mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    count = max(1, -(-hidden.shape[1] // size))  # of similar length: a short last chunk takes nearly as long
    parts = (part.chunk(count, 1) for part in (hidden, targets, mask))
    return ((chunk.contiguous(), target, counts) for chunk, target, counts in zip(*parts, strict=True))


def nll_of_logits(
    logits: Tensor, targets: Tensor, mask: Tensor, count_correct: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`FusedCrossEntropy.nll` that may be differentiated any number of times."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return nll.masked_fill(~mask, 0).sum(-1), correct_tokens(logits, targets, mask) if count_correct else None


def shifted_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of the labels of each row, each predicted from the position before it; `[B]`.

    Args:
        logits (`Tensor`): `[B, T, V]`.
        labels (`Tensor`): `[B, T]`, `IGNORED` where a label does not count; the first label of a row is not predicted.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    nll = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view_as(targets).sum(1)


def correct_tokens(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """How many targets of each sample have the largest of their logits `[B, n, V]`; `[B]`."""
    return ((logits.detach().argmax(-1) == targets) & mask).sum(-1)


def nll_and_gradient(
    logits: Tensor, targets: Tensor, mask: Tensor, count_correct: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`FusedCrossEntropy.nll_and_gradient`, in place where possible."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=wide)
    nll = -log_probabilities.gather(-1, targets[..., None])[..., 0].masked_fill(~mask, 0).sum(-1)
    correct = correct_tokens(logits, targets, mask) if count_correct else None
    gradient = log_probabilities.exp_().scatter_add_(
        -1, targets[..., None], -torch.ones_like(targets, dtype=wide)[..., None]
    )
    return nll, correct, (gradient * mask[..., None]).to(logits.dtype)


def _compilable_nll_and_gradient(
    logits: Tensor, targets: Tensor, mask: Tensor, count_correct: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`nll_and_gradient` without a scatter, which a compiler cannot fuse. Compiled, it writes nothing of the logits'
    size except the gradient; uncompiled, it would be slower."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(-1, keepdim=True)
    nll = (normaliser - wide.gather(-1, targets[..., None]))[..., 0].masked_fill(~mask, 0).sum(-1)
    correct = correct_tokens(logits, targets, mask) if count_correct else None
    at_target = torch.arange(logits.shape[-1], device=logits.device) == targets[..., None]
    return nll, correct, (((wide - normaliser).exp() - at_target) * mask[..., None]).to(logits.dtype)


FUSED = FusedCrossEntropy(nll_of_logits, nll_and_gradient)
"""`FusedCrossEntropy` in plain PyTorch."""


class _GradientInForward(torch.autograd.Function):
    """The gradient of each sample's loss for its hidden states, computed in the forward pass.

    Samples do not interact, so the backward pass only scales each sample's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        mask: Tensor,
        head: Head,
        fused: FusedCrossEntropy,
        size: int,
        count_correct: bool,
    ) -> tuple[Tensor, Tensor | None]:
        gradients: list[Tensor] = []
        sums = []
        for chunk, target, counts in _chunks(hidden, targets, mask, size):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                logits = head(leaf)
            *nll_and_correct, gradient = fused.nll_and_gradient(logits.detach(), target, counts, count_correct)
            gradients += torch.autograd.grad(logits, leaf, gradient)
            sums.append(nll_and_correct)
        ctx.save_for_backward(torch.cat(gradients, dim=1))
        nll, correct = zip(*sums, strict=True)
        found = torch.stack(correct).sum(0) if count_correct else None
        if found is not None:
            ctx.mark_non_differentiable(found)
        return torch.stack(nll).sum(0), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * cotangent[:, None, None].to(gradient.dtype), None, None, None, None, None, None
