"""A backbone whose layers keep only their input for the backward pass, which recomputes the rest."""

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
    """The same model with its first layers recomputed in the backward pass.

    Args:
        backbone (`PreTrainedModel`): not changed. The copy shares all modules that do not contain such a layer.
        layers (`int`): how many layers, from the first.
        offloaded (`bool`, *optional*, defaults to `False`): keep the inputs of these layers on the CPU.
    """
    chosen = decoder_layers(backbone)[:layers]

    def again(module: nn.Module) -> nn.Module | None:
        if module not in chosen:
            return None
        copy = shallow_copy(module)
        # A compiled layer stays compiled. Otherwise hooks run outside of the checkpoint, as in Transformers.
        run = module._compiled_call_impl or module.forward
        copy.__dict__ |= {"forward": partial(_again, run, offloaded, module.training), "_compiled_call_impl": None}
        return copy

    return with_replaced(backbone, again)


def _again(run: Callable[..., Any], offloaded: bool, random: bool, *args: Any, **kwargs: Any) -> Any:
    """Run a layer; only its positional arguments are saved for the backward pass, on the CPU if offloaded."""
    with save_on_cpu(pin_memory=True) if offloaded else nullcontext():
        return checkpoint(partial(run, **kwargs), *args, use_reentrant=False, preserve_rng_state=random)
