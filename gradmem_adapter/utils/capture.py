"""Whether a CUDA graph is being captured, during which no value can be read from the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_static: ContextVar[bool] = ContextVar("gradmem_static", default=False)


@contextmanager
def static_shapes() -> Iterator[None]:
    """Code in the block uses the shapes that it uses during CUDA graph capture, whatever the values are."""
    token = _static.set(True)
    try:
        yield
    finally:
        _static.reset(token)


def capturing() -> bool:
    """Whether a CUDA graph is being captured, or a run prepares for it; no value can be read from the GPU then."""
    return _static.get() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
