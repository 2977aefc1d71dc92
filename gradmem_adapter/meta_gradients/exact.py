"""The exact meta-gradient: second order, reverse over reverse."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.meta_gradients.base import Gradients, Step, _vjp
from gradmem_adapter.ops.attention import TwiceDifferentiableAttention
from gradmem_adapter.write.loss import write_gradient


class Exact:
    """Second order, reverse over reverse: the gradient of the gradient."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        with TwiceDifferentiableAttention():
            gradient, values, _ = write_gradient(step.writer, step.state.memory, step.context, create_graph=True)
            return _vjp([*step.update(gradient), values], [*step.numbers, *step.weights], [*after, losses])
