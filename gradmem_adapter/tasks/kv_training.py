"""Training and measuring on key-value retrieval: data made on the device, steps captured as graphs."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import torch
import yaml
from peft import get_peft_model
from torch import Tensor, nn

from gradmem_adapter.baselines import ForwardMemory, FullContext
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.training.graphed_step import GraphedStep
from gradmem_adapter.training.speed import compiled_layers, fast_matmul, maskless_attention

from .kv_retrieval import KVRetrieval, kv_backbone, kv_hits

METHODS = ("gradmem", "forward_memory", "full_context")
STRICT = pydantic.ConfigDict(extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class KVMix:
    """One kind of batch in a stage. `share` weighs it against the stage's others, `write_steps` are drawn from."""

    max_pairs: int
    contexts: int
    queries: int
    min_pairs: int | None = None
    write_steps: tuple[int, ...] = (1,)
    share: float = 1.0

    @property
    def name(self) -> str:
        """The numbers of pairs, as "16" or "4-16"."""
        return str(self.max_pairs) if self.min_pairs in (None, self.max_pairs) else f"{self.min_pairs}-{self.max_pairs}"


class Kind(NamedTuple):
    """What decides the shapes and the precision of a step, and so the graph that it is captured in."""

    mix: KVMix
    write_steps: int
    bf16: bool

    @property
    def name(self) -> str:
        """Pairs and write steps, as "N=4-16 K=2"."""
        return f"N={self.mix.name} K={self.write_steps}"


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class KVStage:
    """`steps` training steps on a mix of batches; stages follow one another (a curriculum over pairs)."""

    steps: int
    mix: tuple[KVMix, ...]
    lr: float = 1e-3
    bf16: bool = False
    """In bf16 mixed precision; otherwise in float32 (matrix products in TF32)."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class KVRecipe:
    """Everything a training run is made of, as `gradmem train` reads it from YAML."""

    stages: tuple[KVStage, ...]
    method: str = "gradmem"
    backbone: dict[str, Any] = field(default_factory=dict)
    """Arguments of `kv_backbone`."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Fields of `GradMemConfig`."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 500
    decay_share: float = 0.3
    """The last share of all steps, over which the learning rate falls to a twentieth."""
    seed: int = 0
    compile: bool = True
    """Compile the backbone's layers, on a GPU."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}.")
        if not self.stages:
            raise ValueError("A recipe needs at least one stage.")

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> KVRecipe:
        """Read a recipe from YAML; `overrides` replace top-level fields.

        Raises:
            ValueError: a field is unknown or has a value that cannot work; the message names it.
        """
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a mapping of fields, got {type(content).__name__}.")
        return pydantic.TypeAdapter(cls).validate_python(content | overrides)

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> KVStage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def lr_at(self, step: int) -> float:
        """Warm-up, then the stage's rate, then a linear decay to a twentieth."""
        left = (self.steps - step) / max(1, self.decay_share * self.steps)
        return self.stage_at(step).lr * min(1.0, (step + 1) / max(1, self.warmup_steps), max(0.05, left))

    def kind_at(self, step: int) -> Kind:
        """The batch and the write steps of a step, drawn by its number alone, so that a resumed run draws the same."""
        draw = random.Random(f"{self.seed}:{step}")
        mix = self.stage_at(step).mix
        chosen = draw.choices(mix, [part.share for part in mix])[0]
        return Kind(chosen, draw.choice(chosen.write_steps), self.stage_at(step).bf16)

    def build(self) -> nn.Module:
        """The untrained model."""
        torch.manual_seed(self.seed)
        backbone = kv_backbone(**self.backbone)
        memory = dict(self.memory)
        if self.method == "full_context":
            return FullContext(backbone)
        if self.method == "forward_memory":
            names = ("num_memory_tokens", "write_steps", "reconstruction_weight")
            return ForwardMemory(backbone, **{name: memory[name] for name in names if name in memory})
        return get_peft_model(backbone, GradMemConfig(train_backbone=True, **memory))


@dataclass
class KVProgress:
    """What a callback is told every `log_every` steps."""

    step: int
    seconds: float
    """Of training alone, in this run."""
    means: dict[str, dict[str, float]]
    """By kind of batch, as "N=16 K=1"."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


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
    step = _resume(output / "last", model, step_on)
    torch.manual_seed(recipe.seed + step)
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


def _state_file(directory: Path) -> Path:
    return directory / "state.pt"


def _step_of(directory: Path) -> int:
    file = _state_file(directory)
    return int(torch.load(file, weights_only=True, map_location="cpu")["step"]) if file.exists() else 0


def _save(directory: Path, model: nn.Module, step_on: GraphedStep[Any], step: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {"weights": model.state_dict(), "optimizer": step_on.state_dict(), "step": step}
    temporary = directory / "state.tmp"
    torch.save(state, temporary)
    os.replace(temporary, _state_file(directory))


def _resume(directory: Path, model: nn.Module, step_on: GraphedStep[Any]) -> int:
    file = _state_file(directory)
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True, map_location=next(model.parameters()).device)
    try:
        model.load_state_dict(state["weights"])
    except RuntimeError as error:
        raise ValueError(f"{file} was made by a model of another shape: {error}") from error
    step_on.load_state_dict(state["optimizer"])
    return int(state["step"])


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
