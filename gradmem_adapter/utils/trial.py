"""Trying a backbone out on a few tokens, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torch.random import fork_rng
from transformers import PreTrainedModel

from gradmem_adapter.utils.backbone import device_of, max_positions

TOKENS = 6
"""How many tokens a trial has: a pass costs what reading the weights costs."""


@contextmanager
def undisturbed(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside, the backbone is in eval mode and not compiled; afterwards it, what it keeps in attributes and buffers,
    and all random states are as they were.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
    """
    kept = [
        (table, dict(table))
        for module in backbone.modules()
        for table in (module.__dict__, module._parameters, module._buffers, module._modules)
    ]
    devices = {p.device for p in backbone.parameters() if p.device.index is not None}
    kind = next((device.type for device in devices), None)
    forked = fork_rng([device.index for device in devices], device_type=kind) if kind else fork_rng([])
    with forked, torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        try:
            for module in backbone.modules():
                module.training = False
            yield
        finally:
            for table, entries in kept:
                for added in table.keys() - entries.keys():
                    del table[added]
                table.update(entries)


def sample_tokens(backbone: PreTrainedModel, rows: int) -> Tensor:
    """Token ids `[rows, n]` that mean nothing special to the model, the same in every call; n is `TOKENS` or less."""
    rows_of = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    vocabulary = min(len(cast(Tensor, embeddings.weight)) for embeddings in rows_of)
    configs = [backbone.config, backbone.config.get_text_config()]
    special = {
        token
        for config in configs
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, list) else [value])
    }
    plain = torch.tensor([token for token in range(min(vocabulary, 1000)) if token not in special])
    length = min(TOKENS, max_positions(backbone) or TOKENS)
    draws = torch.randint(len(plain), (rows, length), generator=torch.Generator().manual_seed(0))
    return plain[draws].to(device_of(backbone))


def tolerance(backbone: PreTrainedModel) -> float:
    """How far apart logits may be that are the same but for rounding, as `distance` tells it."""
    if getattr(backbone, "is_quantized", False):
        return 0.3
    return 0.01 if backbone.dtype.itemsize >= 4 else 0.06


def distance(found: Tensor, expected: Tensor) -> float:
    """How far logits are from what they should be, as a share of how far those of one place are from the mean place.

    The mean over places and no maximum: in low precision a router may choose otherwise here and there.

    Args:
        found (`Tensor`): `[..., V]`.
        expected (`Tensor`): the same shape.
    """
    found, expected = (logits.detach().double().flatten(0, -2).cpu() for logits in (found, expected))
    spread = torch.linalg.vector_norm(expected - expected.mean(0), dim=-1).mean()
    return float(torch.linalg.vector_norm(found - expected, dim=-1).mean() / spread.clamp(min=1e-12))
