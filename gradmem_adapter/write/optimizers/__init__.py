"""The rules of a write step, one per file. A new rule is a file here, registered in `OPTIMIZERS`."""

from gradmem_adapter.write.optimizers.adam import Adam
from gradmem_adapter.write.optimizers.base import WriteOptimizer, WriteState
from gradmem_adapter.write.optimizers.sgd import SGD

OPTIMIZERS: dict[str, WriteOptimizer] = {
    "sgd": SGD(),
    "adam": Adam(),
}
"""The write optimizers by their names in `GradMemConfig.write_optimizer`."""

__all__ = ["OPTIMIZERS", "WriteOptimizer", "WriteState"]
