"""Adam as a write step."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.write.optimizers.base import WriteOptimizer, WriteState
from gradmem_adapter.write.rates import Rate


class Adam(WriteOptimizer):
    """Adam (Kingma and Ba, 2015, algorithm 1) per element of the memory, betas 0.9 and 0.999."""

    buffers = 2  # running means of the gradient and of its square

    def update(self, state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
        step = state.step + 1
        mean, square = state.buffers
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        # The epsilon is inside the square root, which then has a derivative at a zero gradient.
        scale = (square / (1 - 0.999**step) + 1e-16).sqrt()
        return WriteState(state.memory - lr * mean / (1 - 0.9**step) / scale, (mean, square), step)
