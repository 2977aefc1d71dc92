"""The trained weights of any module as a safetensors file, for models without a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradmem_adapter.utils.adapter_file import check_tensors
from gradmem_adapter.utils.files import replacing

WEIGHTS = "model.safetensors"


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained_weights(model: nn.Module, path: str | Path) -> None:
    """Save the trained weights of a module into a directory, which may hold other files."""
    Path(path).mkdir(parents=True, exist_ok=True)
    with replacing(Path(path) / WEIGHTS) as temporary:
        save_file({name: value.contiguous() for name, value in trained_weights(model).items()}, temporary)


def read_trained_weights(path: str | Path) -> dict[str, Tensor]:
    """Read weights saved by `save_trained_weights`, by name; `FileNotFoundError` if there are none."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"There are no trained weights in {str(path)!r}: it has no {WEIGHTS}.")
    return load_file(file)


@torch.no_grad()
def load_trained_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights saved by `save_trained_weights` into a module.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they belong to another model; the message names a tensor.
    """
    weights, own = read_trained_weights(path), trained_weights(model)
    check_tensors(Path(path) / WEIGHTS, weights, own)
    for name, value in own.items():
        value.copy_(weights[name])
