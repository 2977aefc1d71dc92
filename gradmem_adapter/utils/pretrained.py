"""Saving a causal LM as Transformers does, in whichever process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save_here(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """`model.save_pretrained`, which by itself writes nothing, and says nothing, in any but process 0 of a group.

    Who unpacks a backbone first, or saves on each node of several, may be another one.

    Args:
        model (`PreTrainedModel`): whose weights this process has wholly.
        folder (`Path`): for this process alone.
        options: as for `save_pretrained`.
    """
    model.__dict__["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        model.save_pretrained(str(folder), **options)
    finally:
        model.__dict__.pop("should_save_on_this_rank", None)
