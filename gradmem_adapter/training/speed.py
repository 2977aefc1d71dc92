"""What makes a training step fast on a GPU, each for as long as its `with` lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gradmem_adapter.ops.attention import CAUSAL


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Float32 matrix products in TF32 where the GPU has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def maskless_attention(model: nn.Module) -> Iterator[None]:
    """Causal attention without masks: every method here pads on the right."""
    backbones = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [backbone.config._attn_implementation for backbone in backbones]
    for backbone in backbones:
        backbone.config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        for backbone, name in zip(backbones, before, strict=True):
            backbone.config._attn_implementation = name


@contextmanager
def compiled_layers(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The backbone's layers compiled one by one: they share their code, so one is compiled for all."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    limit = torch._dynamo.config.recompile_limit
    if wanted:
        torch._dynamo.config.recompile_limit = 64  # one graph per shape of batch
        for layer in layers:
            layer.compile(dynamic=False)
    try:
        yield
    finally:
        torch._dynamo.config.recompile_limit = limit
        for layer in layers:
            layer._compiled_call_impl = None
