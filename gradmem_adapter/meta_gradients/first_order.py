"""The first-order meta-gradient: the write gradient counts as a constant (first-order MAML, arXiv 1803.02999)."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.meta_gradients.base import Gradients, MetaGradient, Step, vjp


class FirstOrder(MetaGradient):
    """dg/dM = dg/dw = 0: the memory before the step gets v unchanged, and weights get no gradient from the step
    itself."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        values = None if losses is None else step.writer.losses(step.state.memory, step.context)[0]
        return vjp([*step.update(step.gradient), values], [*step.inputs, *step.weights], [*after, losses])
