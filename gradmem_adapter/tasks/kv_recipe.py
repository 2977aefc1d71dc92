"""What a training run on key-value retrieval is made of: model, stages, optimizer."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import pydantic
import torch
from peft import get_peft_model
from torch import nn

from gradmem_adapter.baselines import ForwardMemory, FullContext
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.training.graphed_run import lr_share

from .kv_retrieval import kv_backbone
from .saved import load_trained

METHODS = ("gradmem", "forward_memory", "full_context")
STRICT = pydantic.ConfigDict(extra="forbid")
Drawn: TypeAlias = Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]
"""Numbers, one of which is drawn for each step."""


def check_memory(memory: dict[str, Any]) -> None:
    """Raise `ValueError` for what is no field of `GradMemConfig`: baselines read a few and would not notice."""
    known = {field.name for field in dataclasses.fields(GradMemConfig)}
    if unknown := sorted(memory.keys() - known):
        raise ValueError(f"memory has no field {', '.join(unknown)}; its fields are those of GradMemConfig.")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class KVMix:
    """One kind of batch in a stage. `share` weighs it against the stage's others, `write_steps` are drawn from."""

    max_pairs: pydantic.PositiveInt
    contexts: pydantic.PositiveInt
    queries: pydantic.PositiveInt
    min_pairs: pydantic.PositiveInt | None = None
    write_steps: Drawn = (1,)
    share: pydantic.NonNegativeFloat = 1.0

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

    steps: pydantic.PositiveInt
    mix: Annotated[tuple[KVMix, ...], pydantic.Field(min_length=1)]
    lr: float = 1e-3
    bf16: bool = False
    """In bf16 mixed precision; otherwise in float32 (matrix products in TF32)."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class KVRecipe:
    """Everything a training run is made of, as `gradmem train` reads it from YAML."""

    stages: tuple[KVStage, ...]
    task: Literal["kv_retrieval"] = "kv_retrieval"
    method: str = "gradmem"
    backbone: dict[str, Any] = field(default_factory=dict)
    """Arguments of `kv_backbone`."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Fields of `GradMemConfig`."""
    init_from: str | None = None
    """A checkpoint by a recipe with the same model, whose weights are trained further (`write_lr_from_end` may be new);
    None: untrained weights."""
    write_steps: Drawn | None = None
    """Draw write steps (or passes) from these everywhere, whatever the stages say."""
    keep_write_lrs: pydantic.PositiveInt | None = None
    """Keep so many of the `num_write_lrs` when training is over; None: all."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    muon_rate: pydantic.PositiveFloat | None = None
    """Train the matrices inside the layers by Muon, at this many times the learning rate; None: AdamW trains all."""
    write_rate_factor: pydantic.PositiveFloat = 1.0
    """Train the write learning rates at this many times the learning rate."""
    max_grad_norm: float = 1.0
    warmup_steps: int = 500
    decay_share: float = 0.3
    """The last share of all steps, over which the learning rate falls to a twentieth."""
    minutes: pydantic.PositiveFloat | None = None
    """End after so many minutes of training, if not done before; the learning rate falls by the clock then,
    and what is saved says how many steps were done."""
    seed: int = 0
    compile: bool = True
    """Compile the backbone's layers, on a GPU."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}.")
        if not self.stages:
            raise ValueError("A recipe needs at least one stage.")
        check_memory(self.memory)
        rates = self.memory.get("num_write_lrs", 1) if self.memory.get("learn_write_lr", "no") != "no" else 0
        if self.keep_write_lrs is not None and (self.method != "gradmem" or self.keep_write_lrs > rates):
            raise ValueError(
                f"keep_write_lrs must be at most the number of learned write rates, {rates}, got {self.keep_write_lrs} "
                f"with method {self.method!r}."
            )

    @classmethod
    def of(cls, fields: dict[str, Any]) -> KVRecipe:
        """The recipe with these fields, as YAML or JSON has them.

        Raises:
            ValueError: a field is unknown or has a value that cannot work; the message names it.
        """
        return pydantic.TypeAdapter(cls).validate_python(fields)

    @property
    def trained_steps(self) -> str:
        """The write steps that training draws from, as "5" or "1-12"."""
        steps = {k for stage in self.stages for part in stage.mix for k in self.write_steps or part.write_steps}
        return str(min(steps)) if len(steps) == 1 else f"{min(steps)}-{max(steps)}"

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return sum(stage.steps for stage in self.stages)

    def ended_at(self, step: int) -> KVRecipe:
        """The recipe of a run that was over after so many steps."""
        stages: list[KVStage] = []
        for stage in self.stages:
            left = step - sum(done.steps for done in stages)
            if left > 0:
                stages.append(dataclasses.replace(stage, steps=min(left, stage.steps)))
        return dataclasses.replace(self, stages=tuple(stages))

    def stage_at(self, step: int) -> KVStage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def lr_at(self, step: int, share: float) -> float:
        """Warm-up, then the stage's rate, then a linear decay to a twentieth."""
        return self.stage_at(step).lr * lr_share(step, share, self.warmup_steps, self.decay_share)

    def kind_at(self, step: int) -> Kind:
        """The batch and the write steps of a step, drawn by its number alone, so that a resumed run draws the same."""
        draw = random.Random(f"{self.seed}:{step}")
        mix = self.stage_at(step).mix
        chosen = draw.choices(mix, [part.share for part in mix])[0]
        return Kind(chosen, draw.choice(self.write_steps or chosen.write_steps), self.stage_at(step).bf16)

    def build(self) -> nn.Module:
        """The model before training."""
        torch.manual_seed(self.seed)
        model = self._untrained()
        if self.init_from is not None:
            load_trained(model, Path(self.init_from))
        return model

    def _untrained(self) -> nn.Module:
        backbone = kv_backbone(**self.backbone)
        memory = dict(self.memory)
        if self.method == "full_context":
            return FullContext(backbone)
        if self.method == "forward_memory":
            names = ("num_memory_tokens", "reconstruction_weight")
            return ForwardMemory(backbone, **{name: memory[name] for name in names if name in memory})
        return get_peft_model(backbone, GradMemConfig(train_backbone=True, **memory))
