"""The file with an adapter's weights, and whether they are those of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradmem_adapter.utils.parameters import first_of, wrong_names

_SHOWN = 8
"""So many differences are listed in an error."""


def check_holds_adapter(directory: Path) -> None:
    """Raise `ValueError` unless a directory has an adapter's configuration; the message says where there is one."""
    if (directory / CONFIG_NAME).is_file():
        return
    below = ", ".join(repr(str(file.parent)) for file in sorted(directory.glob(f"*/{CONFIG_NAME}")))
    if below:
        advice = f"There is one in {below}."
    elif (directory / "config.json").is_file():
        advice = (
            "It is a model that no adapter was trained for: train one (gradmem train --backbone), or attach a new one, "
            "get_peft_model(backbone, GradMemConfig(...)), and save it with save_checkpoint."
        )
    else:
        advice = "gradmem train and save_checkpoint make checkpoints."
    raise ValueError(f"{str(directory)!r} is no checkpoint: it has no {CONFIG_NAME}. {advice}")


@contextmanager
def opened_weights(file: Path) -> Iterator[safe_open]:
    """The weights of an adapter; an error says which file is not there or damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"There are no weights of an adapter in {str(file.parent)!r}: it has no {file.name}.")
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"The weights in {str(file.parent)!r} are damaged: {error}.") from error


def round_weights(file: Path, dtype: torch.dtype) -> None:
    """Round the floating-point tensors of a file to a type, in place."""
    tensors = load_file(file)
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(rounded, file, metadata={"format": "pt"})


def check_tensors(
    path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor], *, resize: tuple[int, int] | None = None
) -> None:
    """Raise `ValueError` with the differences unless both have the same tensors, of the same shapes and kinds.

    Floating types may differ in width: the weights of a LoRA may be rounded in a checkpoint.

    Args:
        path (`Path`): the checkpoint, for messages.
        saved (`Mapping[str, Tensor]`): its tensors.
        own (`Mapping[str, Tensor]`): the model's.
        resize (`tuple[int, int]`, *optional*): how many embeddings the model has, and how many it is going to have.
    """
    differences = wrong_names(saved.keys(), own.keys(), own.keys())
    for name in sorted(saved.keys() & own.keys()):
        there, here = saved[name], own[name]
        if there.dim() != here.dim() or not all(
            size == there_size or (size, there_size) == resize
            for size, there_size in zip(here.shape, there.shape, strict=True)
        ):
            differences.append(f"{name!r} has shape {tuple(there.shape)} there and {tuple(here.shape)} here")
        elif there.dtype != here.dtype and not (there.is_floating_point() and here.is_floating_point()):
            differences.append(f"{name!r} is {there.dtype} there and {here.dtype} here")
    if differences:
        raise ValueError(
            f"The checkpoint in {str(path)!r} is of another model: tensor "
            f"{first_of(differences, _SHOWN, '; tensor ')}. Make the model with the configuration of the checkpoint, "
            "or get the checkpoint anew."
        )
