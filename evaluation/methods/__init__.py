"""A gradient-written memory and what it is compared with: a method is one class in one file, and its line here."""

from .base import Method
from .forward_memory import ForwardMemory
from .full_context import FullContext
from .gradmem import GradMem
from .mean_pooling import MeanPooling
from .truncated_text import TruncatedText

METHODS: dict[str, type[Method]] = {
    ForwardMemory.name: ForwardMemory,
    FullContext.name: FullContext,
    GradMem.name: GradMem,
    MeanPooling.name: MeanPooling,
    TruncatedText.name: TruncatedText,
}

__all__ = ["METHODS", "ForwardMemory", "FullContext", "GradMem", "MeanPooling", "Method", "TruncatedText"]
