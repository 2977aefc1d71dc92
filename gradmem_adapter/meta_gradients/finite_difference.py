"""The meta-gradient by a central difference of first-order gradients."""

from __future__ import annotations

import warnings
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.meta_gradients.base import Gradients, MetaGradient, Step, add, differentiated_once, vjp
from gradmem_adapter.utils.kinks import kinks
from gradmem_adapter.write.context import Context

RELATIVE_STEP = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""The relative step of the finite difference, by the dtype that the backbone computes in; see
docs/meta_gradients.md."""


_looked_at: WeakSet[PreTrainedModel] = WeakSet()
"""The backbones that were already checked for kinks."""


class FiniteDifference(MetaGradient):
    """Second order from first-order passes alone: works with fused attention, compiled models, checkpointing.

    With u = (dM'/dg)^T v, and because a Hessian is symmetric, (dg/d(M, w))^T u is the derivative of the ordinary
    gradient of L_w along u (docs/meta_gradients.md). For each sample by itself that is

        [grad_{M,w} L_w(M + t u, w) - grad_{M,w} L_w(M - t u, w)] / 2t

    where the memory vector that moves most moves by RELATIVE_STEP of its length, because models normalise each vector
    by itself. The outer gradient c of the write losses needs no extra pass: each side carries half of it, and the mean
    of the two gradients is the gradient at M up to t^2.
    """

    def check(self, backbone: PreTrainedModel) -> None:
        """Warn once per backbone whose loss has kinks."""
        if backbone in _looked_at:
            return
        _looked_at.add(backbone)
        if found := kinks(backbone):
            warnings.warn(
                f"The loss of {type(backbone).__name__} has kinks: it {' and '.join(found)}. A finite difference "
                "across a kink can be less accurate than the first-order gradient. Use meta_gradient='exact', with "
                "gradient checkpointing if memory is short; docs/meta_gradients.md has figures.",
                stacklevel=2,
            )

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        memory, gradient = step.state.memory.detach(), step.gradient.requires_grad_()
        *inputs, u = vjp(step.update(gradient), [*step.inputs, gradient], after)
        u = torch.zeros_like(memory) if u is None else u
        half = memory.new_zeros(len(memory)) if losses is None else losses / 2

        floor = step.writer.config.memory_init_std  # a memory of zeros has no scale of its own
        lengths = torch.linalg.vector_norm(memory, dim=2).clamp(min=floor)
        furthest = (torch.linalg.vector_norm(u, dim=2) / lengths).amax(dim=1)
        t = self._relative_step(step) / furthest
        # Without an outer gradient there is no direction: both sides are then M, with weight zero.
        offset = t.masked_fill(furthest == 0, 0)[:, None, None] * u
        weight = 1 / (2 * t)

        of_memory = torch.zeros_like(memory)
        of_weights: Gradients = [None] * len(step.weights)
        for rows, signs in self._passes(step):
            side, *more = self._loss_gradients(
                step,
                torch.cat([memory[rows] + sign * offset[rows] for sign in signs]),
                Context(*(torch.cat([part[rows]] * len(signs)) for part in step.context)),
                torch.cat([half[rows] + sign * weight[rows] for sign in signs]),
            )
            if side is not None:
                of_memory[rows] += side.unflatten(0, (len(signs), -1)).sum(0)
            of_weights = add(of_weights, more)
        return [*add(inputs, [of_memory, *[None] * (len(inputs) - 1)]), *of_weights]

    @staticmethod
    def _relative_step(step: Step) -> float:
        if step.writer.config.finite_difference_step is not None:
            return step.writer.config.finite_difference_step
        enabled, autocast_dtype = step.replay.autocast
        return RELATIVE_STEP[autocast_dtype if enabled else step.writer.backbone.dtype]

    @staticmethod
    def _passes(step: Step) -> list[tuple[slice, tuple[int, ...]]]:
        """Which samples and sides go through the model together: about B rows at a time, as in the step itself.

        If both sides of a sample are in one pass, the accumulators of the matrix products subtract them before anything
        is rounded to bf16. If the pass draws random numbers, each side has its own pass, so that both draw the same.
        """
        batch = step.state.memory.shape[0]
        if step.replay.drew:
            return [(slice(0, batch), (1,)), (slice(0, batch), (-1,))]
        middle = (batch + 1) // 2
        return [(slice(start, stop), (1, -1)) for start, stop in ((0, middle), (middle, batch)) if start < stop]

    @staticmethod
    def _loss_gradients(step: Step, memory: Tensor, context: Context, cotangent: Tensor) -> Gradients:
        """Ordinary gradients of sum_b cotangent_b L_w(M_b), for the memory and for the weights."""
        memory = memory.requires_grad_()
        with step.replay():
            losses, _ = differentiated_once(step.writer).losses(memory, context)
            return vjp([losses], [memory, *step.weights], [cotangent])
