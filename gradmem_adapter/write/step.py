"""One write step: the clipped write gradient moves the memory by the rule of the write optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.write.optimizers import OPTIMIZERS, WriteState
from gradmem_adapter.write.rates import Rate


def write_step(
    config: GradMemConfig, state: WriteState, gradient: Tensor, lr: Rate, optimizer: str | None = None
) -> WriteState:
    """Take one write step.

    Args:
        config (`GradMemConfig`): names the clipping norm and the write optimizer.
        state (`WriteState`): the state before the step.
        gradient (`Tensor`): `[B, m, d]`, the write gradient before clipping.
        lr (`Tensor` or `float`): the write learning rate, one number or `[m, d]`.
        optimizer (`str`, *optional*): a write optimizer other than the configured one.
    """
    rule = OPTIMIZERS[optimizer or config.write_optimizer]
    return rule.update(state, clip(gradient, config.write_clip_norm), lr)


def clip(gradient: Tensor, norm: float | None) -> Tensor:
    """Each sample's write gradient, scaled down to a norm if its own is larger:

        g * min(1, norm / |g|)

    Args:
        gradient (`Tensor`): `[B, m, d]`.
        norm (`float`, *optional*): the largest norm. `None`: the gradient is not clipped.
    """
    if norm is None:
        return gradient
    found = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    return gradient * (norm / (found + 1e-6)).clamp(max=1.0)
