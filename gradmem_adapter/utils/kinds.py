"""Type checks of arguments, so that a mistake is reported where it was made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_kind(name: str, value: object, kind: Any, wanted: str) -> None:
    """Raise `TypeError` unless a value has a type.

    Args:
        name (`str`): the caller's name for the value.
        value (`object`): the value to check.
        kind (`type` or a union of types): as for `isinstance`; a union with `None` for optional values.
        wanted (`str`): the type in words, and how to get such a value.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}.")


def as_indices(name: str, value: Any, wanted: str, device: torch.device) -> Tensor:
    """Convert indices to a tensor; `TypeError` if that is impossible.

    Args:
        name, value, wanted: as for `check_kind`.
        device (`torch.device`): the device of the tensor.
    """
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} ({error}).") from error
