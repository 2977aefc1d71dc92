"""Training and measuring on key-value retrieval: data made on the device, steps captured as graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.training.graphed_run import run_graphed, scalars
from gradmem_adapter.write.rates import keep_write_lrs

from .kv_recipe import Kind, KVRecipe
from .kv_retrieval import KVRetrieval, kv_hits, kv_tokenizer
from .saved import load_baseline, load_recipe_fields, save_model


def train_kv(model: nn.Module, recipe: KVRecipe, output: Path, *, device: torch.device | str, **options: Any) -> bool:
    """Train `model` (from `recipe.build()`) in place, going on from `output/last` if a run was interrupted there.

    Args:
        options: as for `run_graphed`: max_seconds, log_every, save_seconds, stop, callback.

    Returns:
        Whether all that the recipe asks for is done.

    Raises:
        TrainingDiverged: the loss is no longer finite; `output/last` is the last good state.
    """
    device = torch.device(device)
    model.to(device).eval()

    def loss(kind: Kind) -> dict[str, Tensor]:
        part, write_steps, bf16 = kind
        batch = KVRetrieval(part.max_pairs, part.min_pairs).sample(part.contexts, part.queries, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(**batch.as_dict(), write_steps=write_steps)
        return scalars(out, kv_hits(out.logits, batch.labels))

    return run_graphed(model, loss, recipe, output, device=device, **options)


def save_kv(model: nn.Module, recipe: KVRecipe, path: Path) -> None:
    """Save a trained model for `load_kv`; one with memory by GradMem also opens with `load_checkpoint`.

    With `recipe.keep_write_lrs` the model loses its further write rates here.
    """
    if recipe.keep_write_lrs is not None:
        keep_write_lrs(cast(PeftModel, model), recipe.keep_write_lrs)
    save_model(model, kv_tokenizer(), recipe, path)


def load_kv(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, KVRecipe]:
    """A model that `save_kv` saved, and how it was trained.

    Raises:
        FileNotFoundError: there is none.
    """
    recipe = KVRecipe.of(load_recipe_fields(path))
    if recipe.method == "gradmem":
        return load_checkpoint(path, device=device)[0], recipe
    model = recipe.build()
    load_baseline(model, path)
    return model.to(device).eval(), recipe


@torch.no_grad()
def evaluate_kv(
    model: nn.Module,
    pairs: int,
    write_steps: int,
    *,
    contexts: int = 512,
    queries: int = 16,
    batch: int = 256,
    seed: int = 1,
) -> float:
    """Share of queries whose value greedy decoding gets right, on fresh contexts of exactly `pairs` pairs."""
    device = next(model.parameters()).device
    hits = []
    for start in range(0, contexts, batch):
        drawn = KVRetrieval(pairs).sample(min(batch, contexts - start), min(queries, pairs), device, seed + start)
        logits = model(**drawn.as_dict(), write_steps=write_steps).logits
        hits.append(kv_hits(logits, drawn.labels))
    return torch.cat(hits).float().mean().item()
