"""How outer gradients cross a write step, one strategy a file. A new one is a file here, imported and entered below."""

from gradmem_adapter.meta_gradients.base import Gradients, MetaGradient, Step
from gradmem_adapter.meta_gradients.exact import Exact
from gradmem_adapter.meta_gradients.finite_difference import FiniteDifference
from gradmem_adapter.meta_gradients.first_order import FirstOrder

STRATEGIES: dict[str, MetaGradient] = {
    "exact": Exact(),
    "finite_difference": FiniteDifference(),
    "first_order": FirstOrder(),
}
"""The strategies by the names that `GradMemConfig.meta_gradient` has for them; it also knows "none", where WRITE as a
whole counts as a constant. A strategy is shared by all models and keeps no state."""

__all__ = ["STRATEGIES", "Gradients", "MetaGradient", "Step"]
