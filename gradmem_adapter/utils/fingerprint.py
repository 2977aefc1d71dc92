"""The identity of backbone + adapter, which ties a memory state to the model that can read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.utils.parameters import adapter_parameters, backbone_parameters

SAMPLES = 64
"""Values read from each backbone tensor: enough to tell two trainings apart, few enough for a model of any size."""

# The fields of the configuration that change what a memory vector means to the model.
_FIELDS = ("memory_projection", "num_control_tokens", "write_head", "lora_phase")
_LORA_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def fingerprint(
    backbone: Iterable[tuple[str, Tensor]], adapter: Iterable[tuple[str, Tensor]], config: GradMemConfig
) -> str:
    """32 hexadecimal digits: the same for the same weights on any device, in any process, whatever their width.

    Values count as float32, so a bfloat16 checkpoint loaded in float32 is the same model. Of each backbone tensor
    the shape and `SAMPLES` evenly spaced values are read, of the adapter all values.

    Args:
        backbone (`Iterable[tuple[str, Tensor]]`): the backbone's named tensors, in any order.
        adapter (`Iterable[tuple[str, Tensor]]`): the adapter's, under names without the adapter's own.
        config (`GradMemConfig`): the adapter's configuration, of which the fields count that change what a memory
            vector means.
    """
    lora: dict[str, Any] = config.to_dict()["lora_config"] or {}
    chosen = {name: getattr(config, name) for name in _FIELDS} | {name: lora.get(name) for name in _LORA_FIELDS}
    digest = hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=16)
    with torch.no_grad():
        for name, tensor in sorted(backbone, key=lambda item: item[0]):
            flat = tensor.detach().reshape(-1)
            _update(digest, name, tensor.shape, flat[:: max(1, flat.numel() // SAMPLES)])
        for name, tensor in sorted(adapter, key=lambda item: item[0]):
            _update(digest, name, tensor.shape, tensor.detach().reshape(-1))
    return digest.hexdigest()


def _update(digest: Any, name: str, shape: torch.Size, values: Tensor) -> None:
    digest.update(f"{name}{tuple(shape)}".encode())
    digest.update(values.float().cpu().contiguous().numpy().tobytes())


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """All modules in `module`, as `modules()` has them but in a fifth of its time (and shared ones more than once)."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        found = waiting.pop()
        if found is not None:
            yield found
            waiting += found._modules.values()


def versions(module: nn.Module) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a parameter of `module` is replaced, moved or modified in place; cheap enough to ask often."""
    return tuple(
        (id(p), p.data_ptr(), 0 if p.is_inference() else p._version)
        for part in walk(module)
        for p in part._parameters.values()
        if p is not None and not p.is_meta
    )


class FingerprintCache:
    """The fingerprint of a model, computed anew when a weight has changed or another adapter is active."""

    def __init__(self) -> None:
        self._last: tuple[Any, str] | None = None

    def get(self, model: nn.Module, adapter: str, config: GradMemConfig) -> str:
        """The fingerprint of a model with one adapter.

        Args:
            model (`nn.Module`): the backbone with its adapters.
            adapter (`str`): the name of the one that counts; it is no part of the fingerprint.
            config (`GradMemConfig`): the adapter's.
        """
        key = adapter, versions(model)
        if self._last is None or self._last[0] != key:
            own = [
                (f"{name}.".replace(f".{adapter}.", "."), parameter)
                for name, parameter in adapter_parameters(model)
                if f".{adapter}." in f"{name}."
            ]
            self._last = key, fingerprint(backbone_parameters(model), own, config)
        return self._last[1]
