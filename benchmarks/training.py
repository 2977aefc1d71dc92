"""A training step as benchmarks measure it: eager, with compiled layers, or as one CUDA graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks import common
from gradmem_adapter.training.compiled import compiled_layers
from gradmem_adapter.training.cuda_graph import GraphedBackward, maskless_attention

HOW = ("eager", "compiled", "graph")
"""Ways to run a step; "graph": compiled layers, forward and backward pass as one CUDA graph."""


def cost_of_a_step(
    loss: Callable[[], Tensor], model: nn.Module, how: str, bf16: bool, args: argparse.Namespace
) -> common.Cost:
    """Time and memory of forward, backward and AdamW of all weights that are trained.

    Args:
        loss (`Callable`): the outer loss of a batch that stays the same.
        model (`nn.Module`): what is trained.
        how (`str`): one of `HOW`.
        bf16 (`bool`): under autocast; otherwise as the weights are.
        args (`Namespace`): the options of `common.parser`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def forward() -> Tensor:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=bf16):
            return loss()

    def table(batch: object) -> tuple[Tensor, Tensor]:
        value = forward()
        return value, value.detach()

    graphed = GraphedBackward(table, parameters) if how == "graph" else None

    def step() -> None:
        optimizer.zero_grad()
        if graphed is None:
            forward().backward()
        else:
            graphed({})
        optimizer.step()

    with ExitStack() as stack:
        stack.enter_context(maskless_attention(model))
        if how != "eager":
            stack.enter_context(compiled_layers(model, static=True))
        return common.measure(step, args.device, args.repeats, warm_up=3)
