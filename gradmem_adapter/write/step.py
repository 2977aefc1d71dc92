"""One write step: the write gradient, clipped, moves the memory as the write optimizer says."""

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
        config (`GradMemConfig`): how it is clipped, and by which rule it is taken.
        state (`WriteState`): where WRITE is.
        gradient (`Tensor`): `[B, m, d]`, the write gradient as it came.
        lr (`Tensor` or `float`): the write learning rate, one or `[m, d]`.
        optimizer (`str`, *optional*): another write optimizer than the configuration's.
    """
    rule = OPTIMIZERS[optimizer or config.write_optimizer]
    return rule.update(state, clip(gradient, config.write_clip_norm), lr)


def clip(gradient: Tensor, norm: float | None) -> Tensor:
    """Each sample's write gradient, scaled down to a norm where it has a larger one:

        g * min(1, norm / |g|)

    Args:
        gradient (`Tensor`): `[B, m, d]`.
        norm (`float`, *optional*): `None`: the gradient stays as it is.
    """
    if norm is None:
        return gradient
    found = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    return gradient * (norm / (found + 1e-6)).clamp(max=1.0)
