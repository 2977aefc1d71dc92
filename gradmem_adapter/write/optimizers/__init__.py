"""The rules of a write step, one a file. A new one is a file here, imported and entered in `OPTIMIZERS`."""

from gradmem_adapter.write.optimizers.adam import Adam
from gradmem_adapter.write.optimizers.base import WriteOptimizer, WriteState
from gradmem_adapter.write.optimizers.sgd import SGD

OPTIMIZERS: dict[str, WriteOptimizer] = {
    "sgd": SGD(),
    "adam": Adam(),
}
"""The write optimizers by the names that `GradMemConfig.write_optimizer` has for them."""

__all__ = ["OPTIMIZERS", "WriteOptimizer", "WriteState"]
