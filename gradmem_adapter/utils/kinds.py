"""Whether what is passed is of the kind that is needed, so that a mistake is named where it was made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_kind(name: str, value: object, kind: Any, wanted: str) -> None:
    """Raise `TypeError` unless a value is of a kind.

    Args:
        name (`str`): what the caller named it.
        value (`object`): what was passed.
        kind (`type` or a union of types): what `isinstance` takes; `None` in a union for what may be left out.
        wanted (`str`): the kind in words, and how one gets it.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}.")


def as_indices(name: str, value: Any, wanted: str, device: torch.device) -> Tensor:
    """A tensor of what was passed as indices; `TypeError` where there is none of it.

    Args:
        name, value, wanted: as for `check_kind`.
        device (`torch.device`): where the tensor is to be.
    """
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} ({error}).") from error
