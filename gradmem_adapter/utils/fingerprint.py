"""The identity of backbone + adapter, which ties a memory state to the model that can read it."""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.weights import plain_tensors, read_weights

KIND = "2-"
"""The prefix of fingerprints. Fingerprints with another prefix are computed in another way and cannot be compared."""

# The fields of the configuration that change what a memory vector means to the model.
_FIELDS = ("memory_projection", "num_control_tokens", "write_head", "lora_phase")
_LORA_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")

# Fields of a backbone's configuration that do not change what it computes in eval mode, or that its weights already
# show. Absent, None, False and 0 count as equal, so a field that Transformers adds does not change fingerprints.
_NO_MATTER = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config", "problem_type"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "name_or_path"),
    *("vocab_size", "max_position_embeddings", "n_positions", "pretraining_tp", "chunk_size_feed_forward"),
    *("task_specific_params", "tokenizer_class", "auto_map"),
}
_NO_MATTER_PARTS = ("token_id", "dropout", "drop", "initializer", "init_", "summary_", "loss")

SAMPLES = 64
"""How many values of each parameter are read to notice changes through `.data`."""

_BLOCK = 2**17
"""How many values are summed together: with more, `_places` could not give each position a different factor."""


def fingerprint(model: PreTrainedModel, adapter: str, config: GradMemConfig) -> str:
    """`KIND` and 32 hexadecimal digits: the same for the same weights on any device, in any process and floating-point
    width.

    All values count, as float32, so a bfloat16 checkpoint loaded in float32 is the same model. The fields of the
    backbone's configuration that affect computation also count: heads, activations, positions, constants, the LoRA's
    scaling.

    Args:
        model (`PreTrainedModel`): the backbone with its adapters.
        adapter (`str`): the name of the adapter that counts; the name itself does not.
        config (`GradMemConfig`): its configuration; the fields that change what a memory vector means count.
    """
    lora: dict[str, Any] = config.to_dict()["lora_config"] or {}
    chosen = {name: getattr(config, name) for name in _FIELDS} | {name: lora.get(name) for name in _LORA_FIELDS}
    found: list[tuple[str, torch.Size, list[Tensor]]] = []
    for name, tensor, of_adapter in read_weights(model):
        if of_adapter:
            if f".{adapter}." not in f"{name}.":
                continue
            name = f"adapter {name}.".replace(f".{adapter}.", ".")
        found.append((name, tensor.shape, list(_sums(tensor))))
    sums = iter(torch.cat([part.cpu() for _, _, parts in found for part in parts]).tolist())
    described = sorted(
        (name, tuple(shape), [next(sums) for part in parts for _ in part]) for name, shape, parts in found
    )
    whole = json.dumps(
        [chosen, _meaning(model.config), scaling(model, adapter), described], sort_keys=True, default=str
    )
    return KIND + hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def _meaning(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that change what the same weights compute."""
    return {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if value and name not in _NO_MATTER and name[0] != "_" and not any(part in name for part in _NO_MATTER_PARTS)
    }


@torch.no_grad()
def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Sums `[n]` (int64) of the bits of each block of a tensor's values: exact, so the order of addition does not
    matter.

    The bits of each value are multiplied by an odd number for its position and folded, otherwise swapped values and
    changed signs would cancel out. They are folded before that too: the lower half of a bfloat16 value is 0, so the
    product would depend only on the lower half of the position's number.
    """
    flat = tensor.reshape(-1)
    whole = len(flat) // _BLOCK * _BLOCK
    at_a_time = 2 if flat.device.type == "cpu" else 128  # few kernels on a GPU
    for part in (*flat[:whole].view(-1, _BLOCK).split(at_a_time), flat[whole:]):
        bits = _bits(part)
        mixed = (bits >> 16).bitwise_xor_(bits).mul_(_places(flat.device)[: part.shape[-1]])
        mixed.bitwise_xor_(mixed >> 16)
        # Summed in pairs of int32, which is several times faster than summing int32 into int64.
        yield nn.functional.pad(mixed, (0, mixed.shape[-1] % 2)).view(torch.int64).sum(-1).view(-1)


@lru_cache(maxsize=16)
def _places(device: torch.device) -> Tensor:
    """An odd number for each position in a block; any two differ in their lowest 18 bits."""
    return (2 * torch.arange(_BLOCK, dtype=torch.int32, device=device) + 1) * -1_640_531_535


def _bits(values: Tensor) -> Tensor:
    """Values as 32-bit integers; floating-point values by their bits in float32."""
    if values.element_size() == 1:
        return values.view(torch.uint8).int()
    return values.float().view(torch.int32) if values.is_floating_point() else values.int()


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """All modules in `module`, like `modules()` but in a fifth of the time; shared modules come more than once."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        found = waiting.pop()
        if found is not None:
            yield found
            waiting += found._modules.values()


def scaling(model: nn.Module, adapter: str) -> tuple[float, ...]:
    """The scaling of an adapter's LoRA in each layer: `alpha / r`, unless PEFT's `rescale_adapter_scale` changed it.

    Args:
        model (`nn.Module`): the backbone with its adapters.
        adapter (`str`): the name of the adapter.
    """
    return tuple(
        layer.scaling[adapter] for layer in walk(model) if isinstance(layer, LoraLayer) and adapter in layer.scaling
    )


def versions(module: nn.Module) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a parameter of `module` is replaced, moved or modified in place; cheap enough to ask often.

    It does not notice changes through `.data` or by a fused optimizer; see `_Samples`.
    """
    return tuple(
        (id(p), p.data_ptr(), 0 if p.is_inference() else p._version)
        for part in walk(module)
        for p in part._parameters.values()
        if p is not None and not p.is_meta
    )


class _Samples:
    """Some values of every parameter, to notice what `_version` does not count: `.data` and fused optimizers.

    They are read through views. Creating a view takes as long as reading it, so views are kept until `release`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._views: list[list[Tensor]] | None = None
        self._values = self._read(parameters)

    def release(self) -> None:
        """Drop the views, which keep weights alive."""
        self._views = None

    def _read(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        views = self._views
        if views is None:
            groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in parameters:
                for _, tensor in plain_tensors("", parameter):
                    if not tensor.is_meta:
                        groups[tensor.device, tensor.dtype].append(_sample(tensor))
            views = self._views = list(groups.values())
        return [_bits(torch.cat(group)) for group in views]

    def same(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the values of the same parameters, at the same addresses, are unchanged."""
        return all(map(torch.equal, self._values, self._read(parameters)))


def _sample(tensor: Tensor) -> Tensor:
    """A view of about `SAMPLES` values of a tensor, spread over rows and columns."""
    if not tensor.is_contiguous():
        return tensor.flatten(0, -2).select(-1, 0) if tensor.dim() > 1 else tensor
    stride = max(1, tensor.numel() // SAMPLES)
    while tensor.dim() and math.gcd(stride, tensor.shape[-1]) > 1:
        stride -= 1
    return tensor.view(-1)[::stride]


class Fingerprinted(NamedTuple):
    """A model with one adapter, as it was looked at.

    Args:
        fingerprint (`str`): the fingerprint.
        key (`Hashable`): changes with any difference, including the device or dtype of weights.
    """

    fingerprint: str
    key: Hashable


class _Snapshot:
    """A model as it was when it was looked at, with the fingerprints that were computed since then.

    Modules are collected once. Their child dictionaries then show whether one was replaced, in a fraction of the time
    of a walk. Modules and parameters can still be freed: when one is, all references are dropped. If a parameter's
    `.data` is replaced, the old data stays in memory until the next check, unless all weights are moved, which calls
    `release`.

    Args:
        model (`PreTrainedModel`): the backbone with its adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        owner = weakref.ref(self)

        def gone(_: weakref.ref[Any]) -> None:
            if (seen := owner()) is not None:
                seen._gone()

        modules = list(walk(model))
        self._children = [module._modules for module in modules]
        self._held = [module._parameters for module in modules]
        self._layers = [weakref.ref(module) for module in modules if isinstance(module, LoraLayer)]
        parameters, self._before = self._read()
        # Their callbacks run before the `id` of a freed object can be reused, so ids identify objects while these
        # exist.
        self._parts = [weakref.ref(part, gone) for part in (*modules, *parameters)]
        self._samples = _Samples(parameters)
        places = tuple([(parameter.device, parameter.dtype) for parameter in parameters])
        self._key: Hashable = (tuple([weakref.ref(module) for module in modules]), places)
        self._found: dict[str, Fingerprinted] = {}

    def of(self, model: PreTrainedModel, adapter: str, config: GradMemConfig) -> Fingerprinted:
        """The fingerprint of the model, which is unchanged, with one adapter; see `fingerprint` for the arguments."""
        if adapter not in self._found:
            found = fingerprint(model, adapter, config)
            self._found[adapter] = Fingerprinted(found, (found, adapter, self._key))
        return self._found[adapter]

    def _gone(self) -> None:
        """A module or a parameter was freed, so drop the references that would keep its content alive."""
        self._parts, self._children, self._held = [], [], []
        self.release()

    def _read(self) -> tuple[list[nn.Parameter], tuple[tuple[Any, ...], ...]]:
        """The existing parameters, and a value that changes whenever a module or parameter is replaced, moved or
        modified in place, or a LoRA's scaling changes."""
        found = [p for held in self._held if held for p in held.values() if p is not None and not p.is_meta]
        layers = [layer() for layer in self._layers]
        return found, (
            tuple([id(child) for children in self._children if children for child in children.values()]),
            tuple([id(parameter) for parameter in found]),
            tuple([tuple(layer.scaling.items()) for layer in layers if layer is not None]),
            tuple([parameter.data_ptr() for parameter in found]),
            tuple([0 if parameter.is_inference() else parameter._version for parameter in found]),
        )

    def same(self) -> bool:
        """Whether the model is still the same."""
        parameters, now = self._read()
        return bool(self._parts) and now == self._before and (capturing() or self._samples.same(parameters))

    def release(self) -> None:
        """Drop references to weights before they are moved. Their sampled values are kept, so changes are still
        noticed."""
        self._samples.release()


class FingerprintCache:
    """The fingerprints of a model with each of its adapters, computed again when a weight has changed.

    A change through `.data` or by a fused optimizer is noticed if it affects a whole matrix, but not if it affects
    single values.
    """

    def __init__(self) -> None:
        self._last: _Snapshot | None = None

    def __reduce__(self) -> tuple[type[FingerprintCache], tuple[()]]:
        return FingerprintCache, ()

    def get(self, model: PreTrainedModel, adapter: str, config: GradMemConfig) -> Fingerprinted:
        """The fingerprint of a model with one adapter; see `fingerprint` for the arguments."""
        last = self._last
        if last is None or not last.same():
            last = self._last = _Snapshot(model)
        return last.of(model, adapter, config)

    def release(self) -> None:
        """Drop references to weights before they are moved or converted."""
        if (last := self._last) is not None:
            last.release()
