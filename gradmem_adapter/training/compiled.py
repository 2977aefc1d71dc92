"""The backbone's layers compiled one by one: they share their code, so one is compiled for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradmem_adapter.utils.backbone import layers_of

RECOMPILE_LIMIT = 64
"""How many shapes of batch a layer is compiled for, with and without gradients."""


@contextmanager
def compiled_layers(
    model: nn.Module, *, static: bool, backend: str | None = None, mode: str | None = None
) -> Iterator[None]:
    """The layers are compiled for as long as the `with` lasts.

    Args:
        static: once for every shape, as suits batches of few shapes; otherwise for any shape from the second one on.
        backend, mode: of `torch.compile`; None: its own.

    Raises:
        ValueError: the model has no layers that Transformers marks as such.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"torch_compile compiles a backbone's layers, and {type(model).__name__} has none that Transformers marks "
            "as such (GradientCheckpointingLayer). Leave torch_compile out, or compile the model yourself."
        )
    options = {"backend": backend or "inductor", "mode": mode}
    with torch._dynamo.config.patch(recompile_limit=max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)):
        try:
            for layer in layers:
                layer.compile(dynamic=False if static else None, **options)
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None


@contextmanager
def uncompiled_layers(model: nn.Module) -> Iterator[None]:
    """The layers run as they are for as long as the `with` lasts: decoding goes through too many shapes."""
    layers = layers_of(model)
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled
