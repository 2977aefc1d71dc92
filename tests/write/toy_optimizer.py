"""A write optimizer with three buffers, as a user would add it: this file and a line in OPTIMIZERS."""

from gradmem_adapter.write.optimizers import WriteOptimizer, WriteState


class Toy(WriteOptimizer):
    """Two means of the gradient, a fast and a slow one, scaled by a mean of its square."""

    buffers = 3

    def update(self, state, gradient, lr):
        fast, slow, square = state.buffers
        fast = 0.5 * fast + 0.5 * gradient
        slow = 0.9 * slow + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        step = (fast + 2 * slow) / (square + 1e-2).sqrt()
        return WriteState(state.memory - lr * step, (fast, slow, square), state.step + 1)
