"""What a meta-gradient strategy is: how outer gradients cross one write step.

A write step (docs/meta_gradients.md; GradMem, arXiv 2603.13875) takes the memory M with the write gradient g to

    M' = M - a g(M, w),    g(M, w) = grad_M L_w(M; C),

w being the trained weights that WRITE runs through. Given the outer gradient v = dL_out/dM', the backward pass needs

    for M:  v - a (dg/dM)^T v        for w:  - a (dg/dw)^T v        for a:  - <v, g>

and a strategy decides how to compute the second-order terms (dg/dM)^T v and (dg/dw)^T v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.meta_gradients.replay import Replay
from gradmem_adapter.ops.cross_entropy import FUSED
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.optimizers import WriteState
from gradmem_adapter.write.step import write_step

Gradients: TypeAlias = Sequence[Tensor | None]
"""Outer gradients, `None` for zero."""


@dataclass
class Step:
    """A write step as it was taken: what a strategy needs to pull outer gradients back through it.

    Args:
        writer (`Writer`): the model that computes the write loss.
        context (`Context`): B contexts.
        state (`WriteState`): what the step started from, leaves of this step's own graph.
        lr (`Tensor`): a scalar or `[m, d]`, the write learning rate.
        gradient (`Tensor`): `[B, m, d]`, the write gradient g of the forward pass, before clipping.
        weights (`Sequence[Tensor]`): w, the trained weights.
        replay (`Replay`): runs a computation under the autocast and random state of the forward pass.
    """

    writer: Writer
    context: Context
    state: WriteState
    lr: Tensor
    gradient: Tensor
    weights: Sequence[Tensor]
    replay: Replay

    def update(self, gradient: Tensor) -> list[Tensor]:
        """The memory and the write optimizer's buffers after a step with this write gradient `[B, m, d]`."""
        return write_step(self.writer.config, self.state, gradient, self.lr).tensors

    @property
    def inputs(self) -> list[Tensor]:
        """The inputs of `update` other than the gradient: memory, the write optimizer's buffers, learning rate."""
        return [*self.state.tensors, self.lr]


class MetaGradient(ABC):
    """How outer gradients cross a write step."""

    def check(self, backbone: PreTrainedModel) -> None:  # noqa: B027 - most work with any backbone
        """Raise `NotImplementedError` if the strategy does not work with this backbone; called before WRITE."""

    @abstractmethod
    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        """Pull outer gradients back through a write step.

        Args:
            step (`Step`): the step; the call runs inside WRITE, under the random state of the forward pass.
            after (`Gradients`): the outer gradients for `step.update(...)`: v for the memory after the step, and those
                for the write optimizer's buffers.
            losses (`Tensor`, *optional*): `[B]`, the outer gradient for the write losses before the step. `None`: zero.

        Returns:
            `Gradients`: the outer gradients for `[*step.inputs, *step.weights]`.
        """


def vjp(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Gradients) -> Gradients:
    """The vector-Jacobian product: the outer gradients for inputs from those of outputs.

    Args:
        outputs (`Sequence`): functions of the inputs; those that are `None` or have no graph are left out.
        inputs (`Sequence[Tensor]`): what to find gradients for.
        cotangents (`Gradients`): the outer gradient of each output.

    Returns:
        `Gradients`: one for each input.
    """
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs], inputs, [cotangent for _, cotangent in pairs], allow_unused=True
    )


def add(first: Gradients, second: Gradients) -> Gradients:
    """The sum of two lists of gradients, one by one."""
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


def differentiated_once(writer: Writer) -> Writer:
    """The writer for write losses that are differentiated once, for memory and weights."""
    return writer if writer.trains_head else replace(writer, fused=FUSED)
