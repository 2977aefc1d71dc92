"""How outer gradients cross a write step, one strategy per file. A new strategy is a file here, registered below."""

from gradmem_adapter.meta_gradients.base import Gradients, MetaGradient, Step
from gradmem_adapter.meta_gradients.exact import Exact
from gradmem_adapter.meta_gradients.finite_difference import FiniteDifference
from gradmem_adapter.meta_gradients.first_order import FirstOrder

STRATEGIES: dict[str, MetaGradient] = {
    "exact": Exact(),
    "finite_difference": FiniteDifference(),
    "first_order": FirstOrder(),
}
"""The strategies by their names in `GradMemConfig.meta_gradient`, which also takes "none": WRITE as a whole is then a
constant. A strategy is shared by all models and keeps no state."""

__all__ = ["STRATEGIES", "Gradients", "MetaGradient", "Step"]
