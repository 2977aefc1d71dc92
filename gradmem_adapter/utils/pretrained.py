"""Saving a causal LM as Transformers does, in any process of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save_here(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """`model.save_pretrained`, which on its own silently writes nothing in any process of a group but process 0.

    The process that unpacks a backbone first, or that saves on each of several nodes, may be another one.

    Args:
        model (`PreTrainedModel`): the model; this process must have all its weights.
        folder (`Path`): a folder that no other process uses.
        options: as for `save_pretrained`.
    """
    model.__dict__["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        model.save_pretrained(str(folder), **options)
    finally:
        model.__dict__.pop("should_save_on_this_rank", None)
