"""The size of the key-value cache that a backbone keeps for a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def kv_cache_bytes(backbone: nn.Module, input_ids: Tensor) -> int:
    """The bytes of the keys and values that a backbone keeps for a text, measured by running it.

    Args:
        backbone (`nn.Module`): a causal LM, with LoRA layers or without.
        input_ids (`Tensor`): `[1, N]`, the text.
    """
    device = next(backbone.parameters()).device
    cache = backbone(input_ids=input_ids.to(device), use_cache=True).past_key_values
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
