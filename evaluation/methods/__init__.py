"""Gradient-written memory and the methods it is compared with: each is a class in its own file, registered here."""

from .base import Method
from .extractive import Extractive
from .forward_memory import ForwardMemory
from .full_context import FullContext
from .gradmem import GradMem
from .mean_pooling import MeanPooling
from .truncated_text import TruncatedText

METHODS: dict[str, type[Method]] = {
    GradMem.name: GradMem,
    ForwardMemory.name: ForwardMemory,
    MeanPooling.name: MeanPooling,
    TruncatedText.name: TruncatedText,
    Extractive.name: Extractive,
    FullContext.name: FullContext,
}
"""Methods by name, in the order of tables and legends."""

__all__ = ["METHODS", "Extractive", "ForwardMemory", "FullContext", "GradMem", "MeanPooling", "Method", "TruncatedText"]
