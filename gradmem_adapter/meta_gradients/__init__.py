"""How outer gradients cross a write step, one strategy a file. A new one is a file here and its line below."""

from gradmem_adapter.meta_gradients.base import STRATEGIES, Gradients, MetaGradient, Step, register_strategy
from gradmem_adapter.meta_gradients.exact import Exact
from gradmem_adapter.meta_gradients.finite_difference import FiniteDifference
from gradmem_adapter.meta_gradients.first_order import FirstOrder

register_strategy("exact", Exact())
register_strategy("finite_difference", FiniteDifference())
register_strategy("first_order", FirstOrder())

__all__ = ["STRATEGIES", "Gradients", "MetaGradient", "Step", "register_strategy"]
