"""A toy strategy, as a user would add one: a file and a line."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.meta_gradients import Gradients, MetaGradient, Step


class StraightThrough(MetaGradient):
    """Passes the outer gradient of the memory through a write step unchanged; nothing else gets one."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        return [after[0], *[None] * (len(step.inputs) - 1 + len(step.weights))]
