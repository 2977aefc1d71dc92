"""What a gradient-written memory is compared with: one file per baseline.

A baseline is a module with the `forward` of `GradMemModel` (queries, targets and contexts in, loss and logits of the
query positions out), so that the same data, training step and evaluation serve all.
"""

from .forward_memory import ForwardMemory
from .full_context import FullContext

__all__ = ["ForwardMemory", "FullContext"]
