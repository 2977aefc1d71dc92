"""A toy strategy, as somebody would add one: a file and a line."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.meta_gradients import Gradients, MetaGradient, Step


class StraightThrough(MetaGradient):
    """The outer gradient of the memory after a write step is that of the memory before it; nothing else gets any."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        return [after[0], *[None] * (len(step.inputs) - 1 + len(step.weights))]
