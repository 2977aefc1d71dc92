"""Training and measuring on key-value retrieval: data made on the device, steps captured as graphs."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradmem_adapter.checkpoint import check_tensors, load_checkpoint, save_checkpoint
from gradmem_adapter.training.errors import TrainingDiverged
from gradmem_adapter.training.graphed_step import GraphedStep
from gradmem_adapter.training.speed import compiled_layers, fast_matmul, maskless_attention

from .kv_recipe import Kind, KVRecipe
from .kv_retrieval import KVRetrieval, kv_hits, kv_tokenizer

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"


@dataclass
class KVProgress:
    """What a callback is told every `log_every` steps."""

    step: int
    seconds: float
    """Of training alone, in this run."""
    means: dict[str, dict[str, float]]
    """By kind of batch, as "N=16 K=1"."""


def train_kv(
    model: nn.Module,
    recipe: KVRecipe,
    output: Path,
    *,
    device: torch.device | str,
    max_seconds: float = math.inf,
    log_every: int = 50,
    save_every: int = 1000,
    stop: Callable[[KVProgress], bool] | None = None,
    callback: Callable[[KVProgress], None] | None = None,
) -> bool:
    """Train `model` in place, going on from `output/last` if a run was interrupted there.

    Args:
        model: from `recipe.build()`.
        output: a directory; `last/` in it holds weights, optimizer and step.
        max_seconds: stop (and save) after so much training.
        stop: asked at each log; True ends the run.

    Returns:
        Whether all steps of the recipe are done.

    Raises:
        TrainingDiverged: the loss is no longer finite; `output/last` is the last good state.
    """
    device = torch.device(device)
    model.to(device).eval()  # no dropout, so that captured steps need no random state of the model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(kind: Kind) -> dict[str, Tensor]:
        part, write_steps, bf16 = kind
        batch = KVRetrieval(part.max_pairs, part.min_pairs).sample(part.contexts, part.queries, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(**batch.as_dict(), write_steps=write_steps)
        values = {"loss": out.loss, "target_loss": out.target_loss}
        values["exact_match"] = kv_hits(out.logits, batch.labels).float().mean()
        if out.write_losses is not None:
            values["write_loss_before"] = out.write_losses[:, 0].mean()
            values["write_loss_after"] = out.write_losses[:, -1].mean()
        if out.memory is not None:
            values["memory_norm"] = torch.linalg.vector_norm(out.memory.detach(), dim=(1, 2)).mean()
        return values

    step_on = GraphedStep(
        loss,
        parameters,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
    )
    torch.manual_seed(recipe.seed)
    step = _resume(output / "last", model, step_on)
    start = time.perf_counter()
    with fast_matmul(), maskless_attention(model), compiled_layers(model, recipe.compile and device.type == "cuda"):
        while step < recipe.steps:
            step_on(recipe.kind_at(step), recipe.lr_at(step))
            step += 1
            done = step == recipe.steps
            if step % log_every and not done:
                continue
            means = {kind.name: values for kind, values in step_on.means().items()}
            if not all(math.isfinite(v) for values in means.values() for v in values.values()):
                raise TrainingDiverged(
                    f"The loss or a gradient is no longer finite at step {step} ({means}). The last good state, of "
                    f"step {_step_of(output / 'last')}, is in {output / 'last'}. Lower the learning rate or set "
                    "write_clip_norm, and start again from there."
                )
            progress = KVProgress(step, time.perf_counter() - start, means)
            if callback is not None:
                callback(progress)
            over = progress.seconds > max_seconds or (stop is not None and stop(progress))
            if done or over or step % save_every == 0:
                _save(output / "last", model, step_on, step)
            if over:
                break
    return step >= recipe.steps


def save_kv(model: nn.Module, recipe: KVRecipe, path: Path) -> None:
    """Save a trained model for `load_kv`; one with memory by GradMem also opens with `load_checkpoint`."""
    if isinstance(model, PeftModel):
        save_checkpoint(model, kv_tokenizer(), path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / (WEIGHTS + ".tmp"))
        os.replace(path / (WEIGHTS + ".tmp"), path / WEIGHTS)
    (path / RECIPE).write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")


def load_kv(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, KVRecipe]:
    """A model that `save_kv` saved, and how it was trained.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (path / RECIPE).is_file():
        raise FileNotFoundError(f"There is no model trained on key-value retrieval in {str(path)!r}: no {RECIPE}.")
    recipe = KVRecipe.of(json.loads((path / RECIPE).read_text(encoding="utf-8")))
    if recipe.method == "gradmem":
        return load_checkpoint(path, device=device)[0], recipe
    model = recipe.build()
    model.load_state_dict(load_file(path / WEIGHTS))
    return model.to(device).eval(), recipe


def _state_file(directory: Path) -> Path:
    return directory / "state.pt"


def _step_of(directory: Path) -> int:
    file = _state_file(directory)
    return int(torch.load(file, weights_only=True, map_location="cpu")["step"]) if file.exists() else 0


def _save(directory: Path, model: nn.Module, step_on: GraphedStep[Any], step: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        "weights": model.state_dict(),
        "optimizer": step_on.state_dict(),
        "step": step,
        "random": _random(next(model.parameters()).device).get_rng_state(),
    }
    temporary = directory / "state.tmp"
    torch.save(state, temporary)
    os.replace(temporary, _state_file(directory))


def _resume(directory: Path, model: nn.Module, step_on: GraphedStep[Any]) -> int:
    file = _state_file(directory)
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True, map_location=next(model.parameters()).device)
    check_tensors(file, state["weights"], model.state_dict())
    model.load_state_dict(state["weights"])
    step_on.load_state_dict(state["optimizer"])
    _random(next(model.parameters()).device).set_rng_state(state["random"].cpu())
    return int(state["step"])


def _random(device: torch.device) -> Any:
    """Where the random state of the data is: they are made on the device."""
    return torch.cuda if device.type == "cuda" else torch.random


@torch.no_grad()
def evaluate_kv(
    model: nn.Module,
    pairs: int,
    write_steps: int,
    *,
    contexts: int = 512,
    queries: int = 16,
    batch: int = 64,
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
