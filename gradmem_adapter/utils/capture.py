"""Whether a CUDA graph is being captured, when no value can be read from the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_static: ContextVar[bool] = ContextVar("gradmem_static", default=False)


@contextmanager
def static_shapes() -> Iterator[None]:
    """What runs inside takes the same shapes as while a CUDA graph is captured, whatever the values are."""
    token = _static.set(True)
    try:
        yield
    finally:
        _static.reset(token)


def capturing() -> bool:
    """Whether a CUDA graph is being captured (or a run made ready for it), where no value can be read from the GPU."""
    return _static.get() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
