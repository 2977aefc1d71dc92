"""The first-order meta-gradient: the write gradient counts as a constant."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.meta_gradients.base import Gradients, Step, _vjp


class FirstOrder:
    """The write gradient is a constant: dM'/dM = 1, dM'/da = -g, and weights get nothing from the step itself."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        values = None if losses is None else step.writer.losses(step.state.memory, step.context)[0]
        return _vjp([*step.update(step.gradient), values], [*step.numbers, *step.weights], [*after, losses])
