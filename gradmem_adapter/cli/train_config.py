"""The configuration of a run of `gradmem train`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmem_adapter.utils.fields import merged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from gradmem_adapter import GradMemConfig, GradMemPeftModel
    from gradmem_adapter.training import GradMemTrainer, GradMemTrainingArguments

MEMORY: dict[str, Any] = {
    "num_memory_tokens": 32, "write_steps": 1, "write_lr": 0.6, "learn_write_lr": "per_element", "write_clip_norm": 0.5,
    "start": "pooled_context", "meta_gradient": "finite_difference", "reconstruction_weight": 0.5,
    "lora_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3, "lr_scheduler_type": "warmup_stable_decay",
    "write_lr_factor": 10.0, "per_device_train_batch_size": 16, "tokens_per_batch": 8192, "num_train_epochs": 3,
    "logging_first_step": True, "logging_steps": 20, "save_steps": 200, "save_total_limit": 1, "report_to": "none",
}  # fmt: skip
FURTHER: dict[str, Any] = {"learning_rate": 3e-4}
"""Replaces fields of `TRAINING` if training continues from a trained adapter."""
LENGTH = ("max_steps", "num_train_epochs", "max_minutes")
"""Fields that may be raised to extend a finished run."""
OWN = {"output_dir", "use_cpu", "resume_from_checkpoint"}
"""Training arguments that the command sets itself."""
ON_GPU: dict[str, Any] = {"bf16": True, "cuda_graphs": True}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run.

    Args:
        rows (`str`): a file of rows to train on, see `read_rows`.
        eval_rows (`str`, *optional*): a file of rows to evaluate on.
        checkpoint (`str`, *optional*): a trained adapter to continue from, as for `load_checkpoint`. None: a new one.
        backbone (`str`, *optional*): a local directory, a hub id, or package:<package>/<file>.gguf. None: the
            checkpoint's, or `SMOLLM2`.
        memory (`dict`, *optional*): fields of `GradMemConfig`, overriding those in `MEMORY`; `lora_config` is merged
            field by field.
        training (`dict`, *optional*): fields of `GradMemTrainingArguments`, overriding those in `TRAINING` and, on a
            GPU, in `ON_GPU`.
    """

    rows: str
    eval_rows: str | None = None
    checkpoint: str | None = None
    backbone: str | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> TrainConfig:
        """The configuration with these fields; `ValueError` names an unknown field."""
        from gradmem_adapter.config import unknown_fields

        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := unknown_fields(fields, known):
            inner = f" Did you mean {', '.join(found)}?" if (found := _inner(fields)) else ""
            raise ValueError(f"There is no field {unknown}{inner} The fields are {', '.join(known)}.")
        for name in ("rows", "eval_rows", "checkpoint", "backbone"):
            if not isinstance(fields.get(name) or "", str):
                raise ValueError(f"{name} must be a string, got {fields[name]!r}.")
        for name in ("memory", "training"):
            if not isinstance(fields.get(name, {}), dict):
                raise ValueError(f"{name} must be a mapping of fields, got {fields[name]!r}.")
        if fields.get("checkpoint") and fields.get("memory"):
            raise ValueError("memory is for a new adapter and cannot be combined with checkpoint: leave one out.")
        return cls(**fields)

    @property
    def memory_fields(self) -> dict[str, Any]:
        """Fields of `GradMemConfig`, except those that depend on the tokenizer and on what is trained."""
        return merged(MEMORY, self.memory)

    def check(self, output: Path, device: torch.device) -> GradMemTrainingArguments:
        """The run's training arguments; `TypeError` or `ValueError` if one of them or of `memory` is invalid."""
        from peft import PeftConfig
        from transformers import TrainingArguments

        from gradmem_adapter import GradMemConfig
        from gradmem_adapter.training import GradMemTrainingArguments

        usual = {field.name for field in dataclasses.fields(TrainingArguments)} - OWN
        own = {field.name for field in dataclasses.fields(GradMemTrainingArguments)} - OWN
        _check_fields("training", self.training, own, shown=own - usual | TRAINING.keys() | set(LENGTH))
        of_peft = {field.name for field in dataclasses.fields(PeftConfig)}
        fields = {field.name for field in dataclasses.fields(GradMemConfig)}
        _check_fields("memory", self.memory, fields, shown=fields - of_peft)
        memory = self._adapter_config()
        steps: dict[str, Any] = {"warmup_steps": 50 if "max_minutes" in self.training else 0.05}  # steps, or a share
        if memory.start != "slots":
            steps["write_steps"] = [0, memory.write_steps]  # 0 trains the start
        bars = {"disable_tqdm": not sys.stderr.isatty()}
        defaults = (
            TRAINING | (FURTHER if self.checkpoint else {}) | bars | steps | ({} if device.type == "cpu" else ON_GPU)
        )
        run = {"output_dir": str(output), "use_cpu": device.type == "cpu"}
        return GradMemTrainingArguments(**(merged(defaults, self.training) | run))

    def trainer(self, arguments: GradMemTrainingArguments) -> GradMemTrainer:
        """The trainer of this run."""
        from transformers import set_seed

        from gradmem_adapter.training import GradMemTrainer, read_rows
        from gradmem_adapter.training.checks import check_rows, limited_collator

        rows = read_rows(self.rows)
        held_out = None if self.eval_rows is None else read_rows(self.eval_rows)
        set_seed(arguments.seed)
        model, tokenizer = self._model()
        collator = limited_collator(None, tokenizer, model, model.active_peft_config)
        check_rows(self.rows, rows, collator)  # the trainer checks them as well, but cannot name the files
        check_rows(str(self.eval_rows), held_out, collator)
        return GradMemTrainer(model, arguments, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)

    def parent(self) -> dict[str, str | None]:
        """The model card's fields about the adapter that training continues from, without local paths."""
        from gradmem_adapter.checkpoint import license_in

        if self.checkpoint is None:
            return {}
        here = Path(self.checkpoint)
        name = here.resolve().name if here.is_dir() else self.checkpoint
        return {"parent": name, "parent_license": license_in(self.checkpoint)}

    def _adapter_config(self) -> GradMemConfig:
        from gradmem_adapter import GradMemConfig
        from gradmem_adapter.checkpoint import config_of

        return GradMemConfig(**self.memory_fields) if self.checkpoint is None else config_of(self.checkpoint)

    def _model(self) -> tuple[GradMemPeftModel, PreTrainedTokenizerBase]:
        """The adapter to train, new or from the checkpoint, and the tokenizer."""
        from gradmem_adapter import SMOLLM2, GradMemConfig, get_peft_model, load_backbone, load_checkpoint

        if self.checkpoint is not None:
            return load_checkpoint(self.checkpoint, backbone=self.backbone, is_trainable=True)
        backbone, tokenizer = load_backbone(SMOLLM2 if self.backbone is None else self.backbone)
        query_format = "text" if tokenizer.chat_template is None else "chat"
        config = GradMemConfig(**{"query_format": query_format, **self.memory_fields})
        return get_peft_model(backbone, config), tokenizer


def _inner(given: Collection[str]) -> list[str]:
    """Which of the given names are inner fields, each with its outer field: `memory.write_steps`."""
    from gradmem_adapter import GradMemConfig
    from gradmem_adapter.training import GradMemTrainingArguments

    kinds: dict[str, Any] = {"memory": GradMemConfig, "training": GradMemTrainingArguments}
    there = {outer: {field.name for field in dataclasses.fields(kind)} for outer, kind in kinds.items()}
    return [f"{outer}.{name}" for name in given for outer, names in there.items() if name in names]


def _check_fields(name: str, given: Collection[str], known: Collection[str], shown: Collection[str]) -> None:
    from gradmem_adapter.config import unknown_fields

    if unknown := unknown_fields(given, known):
        raise ValueError(f"{name} has no field {unknown} Some of its fields: {', '.join(sorted(shown))}.")
