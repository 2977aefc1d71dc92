"""Models that a recipe trained, GradMem's and baselines alike, as files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from gradmem_adapter.checkpoint import check_tensors, load_weights, save_checkpoint
from gradmem_adapter.training.graphed_run import trained
from gradmem_adapter.utils.files import replacing
from gradmem_adapter.write.rates import NEUTRAL

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, recipe: Any, path: Path) -> None:
    """Save a trained model and the recipe (a dataclass) it was made by; memory by GradMem as `save_checkpoint` does."""
    if isinstance(model, PeftModel):
        dtype = getattr(recipe, "lora_dtype", None)
        save_checkpoint(model, tokenizer, path, lora_dtype=None if dtype is None else getattr(torch, dtype))
    else:
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / WEIGHTS) as temporary:
            save_file({name: value.contiguous() for name, value in trained(model).items()}, temporary)
    _write_recipe(recipe, path)


def _write_recipe(recipe: Any, path: Path) -> None:
    with replacing(path / RECIPE) as temporary:
        temporary.write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")


def claim_run(recipe: Any, path: Path) -> None:
    """Keep the recipe in the directory of its run, which no other recipe may go on in.

    Raises:
        ValueError: a run by another recipe is there; the message names the fields that differ.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not (path / RECIPE).is_file() or list(path.iterdir()) == [path / RECIPE]:  # nothing has been trained there
        _write_recipe(recipe, path)
        return
    wanted = json.loads(json.dumps(asdict(recipe)))
    there = load_recipe_fields(path)
    names = sorted(name for name in wanted | there if wanted.get(name) != there.get(name))
    if names:
        raise ValueError(
            f"{path} holds a run by another recipe: {', '.join(names)} differ{'s' if len(names) == 1 else ''}. Give "
            f"--output another directory, or delete that one; its recipe is in {path / RECIPE}."
        )


def load_recipe_fields(path: Path) -> dict[str, Any]:
    """The fields of the recipe that a model was made by.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (path / RECIPE).is_file():
        raise FileNotFoundError(f"There is no model trained by a recipe in {str(path)!r}: no {RECIPE}.")
    return dict(json.loads((path / RECIPE).read_text(encoding="utf-8")))


def load_trained(model: nn.Module, path: Path) -> None:
    """Give a model the weights of another that was saved by `save_model` and has the same tensors, or lacks those that
    change nothing before they are trained."""
    if isinstance(model, PeftModel):
        load_weights(model, path, may_lack=NEUTRAL)
    else:
        load_baseline(model, path)


def load_baseline(model: nn.Module, path: Path) -> None:
    """Give an untrained baseline the weights that `save_model` saved."""
    weights = load_file(path / WEIGHTS)
    check_tensors(path / WEIGHTS, weights, trained(model))
    model.load_state_dict(weights, strict=False)
