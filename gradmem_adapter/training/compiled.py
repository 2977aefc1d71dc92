"""Compiles the backbone's layers one by one. They share their code, so it is compiled once for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradmem_adapter.utils.backbone import layers_of

RECOMPILE_LIMIT = 64
"""The most batch shapes that a layer is compiled for, with and without gradients."""
SHORTCUTS = ("skip_tensor_guards_with_matching_dict_tags", "use_recursive_dict_tags_for_guards")
"""Options of Dynamo with which, in torch 2.11, a compiled layer does not notice that its weights, which are constants
during a write step, need gradients afterwards: part of their gradient is lost without a word."""


@contextmanager
def compiled_layers(
    model: nn.Module, *, static: bool, backend: str | None = None, mode: str | None = None
) -> Iterator[None]:
    """Compile the layers for the duration of the block.

    Args:
        static: compile once per shape, for batches of few shapes; otherwise, from the second shape on, for any shape.
        backend, mode: as for `torch.compile`; None: its defaults.

    Raises:
        ValueError: Transformers marks no layers in the model.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"torch_compile compiles a backbone's layers, but {type(model).__name__} has none of class "
            "GradientCheckpointingLayer. Leave torch_compile out, or compile the model yourself."
        )
    options = {"backend": backend or "inductor", "mode": mode}
    settings: dict[str, Any] = {"recompile_limit": max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)}
    settings |= {name: False for name in SHORTCUTS if hasattr(torch._dynamo.config, name)}
    with torch._dynamo.config.patch(settings):
        try:
            for layer in layers:
                layer.compile(dynamic=False if static else None, **options)
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None


@contextmanager
def uncompiled_layers(model: nn.Module) -> Iterator[None]:
    """Run the layers uncompiled in the block, because decoding has too many shapes."""
    layers = layers_of(model)
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled
