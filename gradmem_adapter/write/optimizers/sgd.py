"""The paper's write step."""

from __future__ import annotations

from torch import Tensor

from gradmem_adapter.write.optimizers.base import WriteOptimizer, WriteState
from gradmem_adapter.write.rates import Rate


class SGD(WriteOptimizer):
    """M_{k+1} = M_k - a * grad_M L_w(M_k; C)    (GradMem, arXiv 2603.13875)."""

    def update(self, state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
        return state._replace(memory=state.memory - lr * gradient, step=state.step + 1)
