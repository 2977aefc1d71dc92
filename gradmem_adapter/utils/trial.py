"""Running a backbone on a few tokens without changing it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.random import fork_rng
from transformers import PreTrainedModel

from gradmem_adapter.utils.backbone import device_of, max_positions

TOKENS = 6
"""The number of tokens in a trial. So few cost no more than reading the weights."""


_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]
"""The dictionaries and sets of every module: parameters, buffers, children, hooks."""

_one_at_a_time = threading.RLock()
"""Random states and PyTorch's compile stance are global to the process."""


@contextmanager
def trial_of(backbone: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yields a copy of a backbone in eval mode, which shares its weights and is not compiled. A trial changes
    attributes, buffers and hooks only in the copy, and random states are restored afterwards.

    Args:
        backbone (`PreTrainedModel`): the causal LM. It is not changed, and other threads may use or change it.
    """
    devices = {p.device for p in backbone.parameters() if p.device.index is not None}
    kind = next((device.type for device in devices), None)
    forked = fork_rng([device.index for device in devices], device_type=kind) if kind else fork_rng([])
    with _one_at_a_time, forked, torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        yield _copied(backbone)


def _copied(backbone: PreTrainedModel) -> PreTrainedModel:
    copies = {module: copy.copy(module) for module in backbone.modules()}

    def own(value: Any) -> Any:
        """Rebind a value to the copies: offloading and patches replace methods by functions bound to a module."""
        if isinstance(value, nn.Module):
            plain = value._modules.get("_orig_mod") or value  # the module that torch.compile wraps
            return copies.get(plain, plain)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, own(value.__self__))
        if isinstance(value, partial):
            bound = partial(own(value.func), *map(own, value.args), **value.keywords)
            bound.__dict__.update(value.__dict__)
            return bound
        if isinstance(value, FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
            return own(value._torchdynamo_orig_callable)
        return value

    for copied in copies.values():
        attributes = copied.__dict__
        attributes.update({name: own(value) for name, value in attributes.items()})
        attributes.update({name: copy.copy(attributes[name]) for name in _TABLES}, training=False)
        attributes["_modules"].update({name: own(child) for name, child in copied._modules.items()})
    return cast(PreTrainedModel, copies[backbone])


def sample_tokens(backbone: PreTrainedModel, rows: int) -> Tensor:
    """Token ids `[rows, n]` that are not special tokens, the same in every call; n is `TOKENS` or less."""
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
    plain = [token for token in range(min(vocabulary, 1000)) if token not in special]
    length = min(TOKENS, max_positions(backbone) or TOKENS)
    generator = torch.Generator("cpu").manual_seed(0)  # the same tokens everywhere, whatever the default device is
    draws = torch.randint(len(plain), (rows, length), generator=generator, device="cpu")
    return torch.tensor(plain, device="cpu")[draws].to(device_of(backbone))


def tolerance(backbone: PreTrainedModel) -> float:
    """The largest `distance` of logits that are equal up to rounding."""
    if getattr(backbone, "is_quantized", False):
        return 0.3
    return 0.01 if backbone.dtype.itemsize >= 4 else 0.06


def distance(found: Tensor, expected: Tensor) -> float:
    """How far logits are from the expected ones, relative to how far logits of one position are from their mean over
    all positions.

    The mean over positions and not the maximum, because in low precision a router may choose other experts at a few.

    Args:
        found (`Tensor`): `[..., V]`.
        expected (`Tensor`): the same shape.
    """
    found, expected = (logits.detach().double().flatten(0, -2).cpu() for logits in (found, expected))
    spread = torch.linalg.vector_norm(expected - expected.mean(0), dim=-1).mean()
    return float(torch.linalg.vector_norm(found - expected, dim=-1).mean() / spread.clamp(min=1e-12))
