"""The file with an adapter's weights, and checks that it matches a model."""

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
"""The most differences that an error lists."""


def check_holds_adapter(directory: Path) -> None:
    """Raise `ValueError` unless a directory has an adapter's configuration; the message names subdirectories with
    one."""
    if (directory / CONFIG_NAME).is_file():
        return
    below = ", ".join(repr(str(file.parent)) for file in sorted(directory.glob(f"*/{CONFIG_NAME}")))
    if below:
        advice = f"There is one in {below}."
    elif (directory / "config.json").is_file():
        advice = (
            "It is a model without an adapter. Train one (gradmem train --backbone), or attach a new one with "
            "get_peft_model(backbone, GradMemConfig(...)) and save it with save_checkpoint."
        )
    else:
        advice = "Checkpoints are made by gradmem train and by save_checkpoint."
    raise ValueError(f"{str(directory)!r} is not a checkpoint: it has no {CONFIG_NAME}. {advice}")


@contextmanager
def opened_weights(file: Path) -> Iterator[safe_open]:
    """Open the weights of an adapter; an error names a file that is missing or damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"There are no adapter weights in {str(file.parent)!r}: {file.name} is missing.")
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
    path: Path,
    saved: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    resize: tuple[int, int] | None = None,
    made_for: str | None = None,
) -> None:
    """Raise `ValueError` with the differences unless both have the same tensors, with the same shapes and kinds of
    dtype.

    Floating-point dtypes may differ in width, because a checkpoint may hold rounded LoRA weights.

    Args:
        path (`Path`): the checkpoint, for messages.
        saved (`Mapping[str, Tensor]`): its tensors.
        own (`Mapping[str, Tensor]`): the model's.
        resize (`tuple[int, int]`, *optional*): how many embeddings the model has now, and how many it will have.
        made_for (`str`, *optional*): the backbone that the adapter was made for, for messages.
    """
    differences = wrong_names(saved.keys(), own.keys(), own.keys())
    for name in sorted(saved.keys() & own.keys()):
        there, here = saved[name], own[name]
        if there.dim() != here.dim() or not all(
            size == there_size or (size, there_size) == resize
            for size, there_size in zip(here.shape, there.shape, strict=True)
        ):
            differences.append(
                f"{name!r} has shape {tuple(there.shape)} in the checkpoint and {tuple(here.shape)} in the model"
            )
        elif there.dtype != here.dtype and not (there.is_floating_point() and here.is_floating_point()):
            differences.append(f"{name!r} is {there.dtype} in the checkpoint and {here.dtype} in the model")
    if differences:
        other = f" The adapter was made for {made_for!r}; for another model, train one (gradmem train --backbone)."
        raise ValueError(
            f"The checkpoint in {str(path)!r} does not match the model: tensor "
            f"{first_of(differences, _SHOWN, '; tensor ')}.{other if made_for else ''} Create the model from the "
            "checkpoint's configuration, or get the checkpoint again."
        )
