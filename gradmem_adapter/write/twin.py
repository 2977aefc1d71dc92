"""A frozen twin of a model: the same weights in other modules, for compiling and capturing."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.lora import PhaseGated, in_phase
from gradmem_adapter.ops.attention import CAUSAL


def frozen_twin(backbone: PreTrainedModel) -> PreTrainedModel:
    """The same weights in other modules, which can be compiled and configured without changing the model itself.

    Its parameters require no gradient, its LoRA acts as in WRITE, and its attention is causal without a mask.

    Args:
        backbone (`PreTrainedModel`): not changed.
    """
    configs: dict[int, PreTrainedConfig] = {}

    def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            configs[id(config)]._attn_implementation = CAUSAL
        return configs[id(config)]

    def twin(module: nn.Module) -> nn.Module:
        if isinstance(module, MemorySlots):
            return module
        if isinstance(module, PhaseGated):
            module = in_phase(module, "write")
        result = copy.copy(module)
        result.__dict__["_parameters"] = {
            name: None if value is None else nn.Parameter(value.detach(), requires_grad=False)
            for name, value in module._parameters.items()
        }
        result.__dict__["_modules"] = {
            name: None if child is None else twin(child) for name, child in module._modules.items()
        }
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                result.__dict__[name] = own_config(value)
        return result

    return twin(backbone)  # type: ignore[return-value]
