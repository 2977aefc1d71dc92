"""Whether a backbone's loss has kinks, where the gradient jumps and a difference of gradients does not give the
curvature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def kinks(backbone: PreTrainedModel) -> list[str]:
    """The causes of kinks in a backbone's loss, as phrases for a message."""
    names = {type(module).__name__ for module in backbone.modules()}
    found = []
    if experts := sorted(name for name in names if name.endswith(("Experts", "MoE", "Moe"))):
        found.append(f"routes tokens to experts ({experts[0]})")
    if any(isinstance(module, nn.ReLU) for module in backbone.modules()):
        found.append("has ReLU activations")
    quantisation = getattr(backbone.config, "quantization_config", None)
    if quantisation is not None and any(_of_activations(*item) for item in _leaves(quantisation)):
        found.append("quantises its activations")
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values in a configuration, also nested ones, each with its path of names."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


def _of_activations(path: str, value: Any) -> bool:
    """Whether an entry of a quantisation configuration means that activations are quantised: `load_in_8bit` for
    bitsandbytes, the name of a type for torchao, fields with "activation" in their name for others."""
    return bool(value) and (
        path.endswith("load_in_8bit") or "activation" in path.lower() or "DynamicActivation" in str(value)
    )
