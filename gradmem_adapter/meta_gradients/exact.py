"""The exact meta-gradient: second order, reverse over reverse."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.meta_gradients.base import Gradients, MetaGradient, Step, vjp
from gradmem_adapter.ops.attention import TwiceDifferentiableAttention, require_double_backward
from gradmem_adapter.write.loss import write_gradient


class Exact(MetaGradient):
    """The gradient of the gradient: the write gradient is computed again with a graph, which is differentiated.

    One step at a time, so that training takes the memory of one step whatever their number.
    """

    def check(self, backbone: PreTrainedModel) -> None:
        require_double_backward(backbone)

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        with TwiceDifferentiableAttention():
            gradient, values, _ = write_gradient(step.writer, step.state.memory, step.context, create_graph=True)
            return vjp([*step.update(gradient), values], [*step.inputs, *step.weights], [*after, losses])
