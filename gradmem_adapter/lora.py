"""Lets a LoRA act only in WRITE or only in READ, without state that threads would share."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from accelerate.utils import has_offloaded_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from gradmem_adapter.config import GradMemConfig, is_from_file
from gradmem_adapter.utils.backbone import Module, with_replaced
from gradmem_adapter.utils.patterns import check_patterns

# READ is the default, so that everything that runs outside WRITE (generate, its worker threads, the recomputation of
# gradient checkpointing in a backward pass) is READ without further code.
_phase: ContextVar[str] = ContextVar("gradmem_phase", default="read")


@contextmanager
def write_phase() -> Iterator[None]:
    """Everything that this thread runs in the block is WRITE."""
    token = _phase.set("write")
    try:
        yield
    finally:
        _phase.reset(token)


@contextmanager
def backward_in_write() -> Iterator[None]:
    """A backward pass in the block stays in this thread, so that recomputed layers (gradient checkpointing) are in
    WRITE too. On a GPU, autograd would otherwise use its own threads."""
    with write_phase(), torch.autograd.set_multithreading_enabled(False):
        yield


class PhaseGated:
    """A mixin for LoRA layers: outside of its adapter's phase, the layer acts as its base layer."""

    gradmem_phases: dict[str, str]  # adapter name -> "write" or "read"; other adapters act in both

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        phases = {self.gradmem_phases.get(name, "both") for name in self.active_adapters}  # type: ignore[attr-defined]
        if phases & {"both", _phase.get()}:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.base_layer(x, *args, **kwargs)  # type: ignore[attr-defined]

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT. Also forgets the adapter's phase, because another adapter may get the name."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.gradmem_phases.pop(adapter_name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """For `pickle` and `copy`: classes created at run time cannot be found by name."""
        return _new_gated, (type(self).__bases__[1],), self.__dict__


@cache
def _gated(cls: type) -> type:
    """A subclass of a LoRA layer class whose layers act in one phase."""
    return type(cls.__name__, (PhaseGated, cls), {})


def _new_gated(cls: type) -> Any:
    return object.__new__(_gated(cls))


def in_phase(layer: PhaseGated, phase: str) -> Any:
    """A layer that always acts as `layer` does in one phase, and shares its modules.

    Args:
        layer (`PhaseGated`): not changed.
        phase (`str`): `"write"` or `"read"`.

    Returns:
        The LoRA layer, or its base layer if no active adapter acts in that phase.
    """
    phases = {layer.gradmem_phases.get(name, "both") for name in layer.active_adapters}  # type: ignore[attr-defined]
    if not phases & {"both", phase}:
        return layer.base_layer  # type: ignore[attr-defined]
    result = copy.copy(layer)
    result.__class__ = type(layer).__bases__[1]
    return result


def gate(layer: LoraLayer, adapter: str, phase: str) -> None:
    """Make one adapter of a LoRA layer act in one phase only; other adapters of the layer keep their phases.

    Args:
        layer (`LoraLayer`): its class is changed; its modules stay.
        adapter (`str`): the adapter's name.
        phase (`str`): `"write"` or `"read"`.
    """
    if not isinstance(layer, PhaseGated):
        layer.__class__ = _gated(type(layer))
    phases: dict[str, str] = layer.__dict__.setdefault("gradmem_phases", {})
    phases[adapter] = phase


def _fill_offloaded(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Create the LoRA weights of layers that accelerate has offloaded. PEFT puts them on the meta device, where such
    layers appear to be, so they have no values."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer._get_available_adapters():
            continue
        if not has_offloaded_params(layer.get_base_layer()):
            continue
        if config.use_dora or config.init_lora_weights == "orthogonal" or adapter not in layer.lora_A:
            raise NotImplementedError(
                "Only linear layers can have a LoRA if they are offloaded. Leave embeddings out of target_modules, and "
                "do not use use_dora or init_lora_weights='orthogonal'."
            )
        for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
            part.to_empty(device=cast(Any, layer.get_base_layer())._hf_hook.execution_device)
            cast(nn.Linear, part).reset_parameters()
        layer.reset_lora_parameters(adapter, config.init_lora_weights)


def inject_lora(model: nn.Module, adapter: str, config: GradMemConfig, low_cpu_mem_usage: bool) -> None:
    """Add the nested LoRA of a configuration to a backbone, with PEFT's own LoRA tuner.

    Args:
        model (`nn.Module`): the backbone.
        adapter (`str`): the adapter's name.
        config (`GradMemConfig`): without a `lora_config` nothing is done.
        low_cpu_mem_usage (`bool`): create the layers on the meta device, because weights are loaded next.

    Raises:
        ValueError: the LoRA's configuration cannot be used.
        ChildProcessError: it comes from a file, and its regular expressions cannot be tested.
    """
    if not isinstance(config.lora_config, LoraConfig):
        return
    if is_from_file(config.lora_config):
        check_patterns(config.lora_config, (name for name, _ in model.named_modules()))
    config.lora_config.inference_mode = config.inference_mode
    outer = model.__dict__.pop("peft_config", None)  # otherwise the LoRA tuner would use our configurations
    try:
        LoraModel(model, {adapter: config.lora_config}, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    except (
        *(AttributeError, LookupError, RuntimeError, TypeError),  # fields of wrong types, which PEFT does not check
        *(re.error, OverflowError),  # invalid regular expressions
    ) as error:
        raise ValueError(f"lora_config cannot be used: {error}") from error
    finally:
        model.__dict__.pop("peft_config", None)
        if outer is not None:
            model.__dict__["peft_config"] = outer
    if not low_cpu_mem_usage:
        _fill_offloaded(model, adapter, config.lora_config)
    if config.lora_phase != "both":
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter in layer._get_available_adapters():
                gate(layer, adapter, config.lora_phase)


def without_lora(model: Module) -> Module:
    """A model with its LoRA layers replaced by their base layers. It shares all other modules with `model`, which is
    not changed."""

    def base_layer(module: nn.Module) -> nn.Module | None:
        return module.get_base_layer() if isinstance(module, LoraLayer) else None

    return with_replaced(model, base_layer)
