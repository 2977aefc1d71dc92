"""What a gradient-written memory is compared with: one file per baseline."""

from .forward_memory import ForwardMemory
from .full_context import FullContext
from .mean_pooling import MeanPooling
from .prefix_model import Prefix, PrefixModel
from .truncated_text import TruncatedText

__all__ = ["ForwardMemory", "FullContext", "MeanPooling", "Prefix", "PrefixModel", "TruncatedText"]
