"""A backbone whose layers keep their input alone for the backward pass, and compute the rest again in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradmem_adapter.utils.backbone import decoder_layers, shallow_copy, with_replaced


def recomputed(backbone: PreTrainedModel, layers: int, *, offloaded: bool = False) -> PreTrainedModel:
    """The same model, of which the first layers are computed again in the backward pass.

    Args:
        backbone (`PreTrainedModel`): stays as it is. The copy shares all modules that are not above a layer.
        layers (`int`): how many, from the first.
        offloaded (`bool`, *optional*, defaults to `False`): the inputs of these layers wait on the CPU.
    """
    chosen = decoder_layers(backbone)[:layers]

    def again(module: nn.Module) -> nn.Module | None:
        if module not in chosen:
            return None
        copy = shallow_copy(module)
        # A compiled layer stays compiled; its hooks, if it is not, stay outside, as in Transformers.
        run = module._compiled_call_impl or module.forward
        copy.__dict__ |= {"forward": partial(_again, run, offloaded, module.training), "_compiled_call_impl": None}
        return copy

    return with_replaced(backbone, again)


def _again(run: Callable[..., Any], offloaded: bool, random: bool, *args: Any, **kwargs: Any) -> Any:
    """Run a layer, whose input is what comes by place: the only thing that is saved, and that may wait elsewhere."""
    with save_on_cpu(pin_memory=True) if offloaded else nullcontext():
        return checkpoint(partial(run, **kwargs), *args, use_reentrant=False, preserve_rng_state=random)
