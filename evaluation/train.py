"""Train a run from its configuration, with `GradMemTrainer`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import is_torch_tf32_available

from gradmem_adapter.training import Batches, GradMemCollator, GradMemTrainer, GradMemTrainingArguments, RowBatches
from gradmem_adapter.training.callbacks import EndByClock, StopOnSignal
from gradmem_adapter.training.pools import load_pools
from gradmem_adapter.utils.fields import claimed

from .config import RunConfig
from .models import RECIPE, build_model, load_teacher, save_model
from .unanswerable import REFUSAL

CHECKPOINT = "checkpoint"
"""The folder of the finished model inside the directory of a run."""
CURVE = "learning_curve.jsonl"
"""The file of logs, one JSON object per line. For steps repeated after an interruption, later lines count."""
DEFAULTS: dict[str, Any] = {
    "report_to": "none", "logging_steps": 50, "save_total_limit": 1, "lr_scheduler_type": "warmup_stable_decay",
}  # fmt: skip


def train(config: RunConfig, output: Path, device: torch.device) -> Path | None:
    """Run a configuration, or resume an interrupted run of it, and save the model.

    Processes started by torchrun or accelerate launch train one model together, each on its own GPU.

    Returns:
        The path of the finished model; None if Ctrl-C or SIGTERM stopped the run, with a checkpoint to resume from.

    Raises:
        BlockingIOError: another run is using `output`.
        ValueError: `output` holds a run of another configuration, or this one is invalid.
        TrainingDiverged: a loss or a gradient is not finite; the last good checkpoint is in `output`.
    """
    arguments = training_arguments(config, output, device)
    with claimed(output / RECIPE, config.fields(), PartialState(cpu=device.type == "cpu")):
        model, tokenizer = build_model(config)
        data = training_batches(config, tokenizer)
        refuses = any(getattr(task, name, 0) for task in config.tasks for name in ("unanswerable", "removed"))
        if refuses and isinstance(model, PeftModel):
            model.active_peft_config.refusal = REFUSAL
        trainer = GradMemTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[LearningCurve(output / CURVE)],
            teacher=load_teacher(config, torch.bfloat16 if arguments.bf16 else torch.float32),
        )  # fmt: skip
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            resumed = trainer.has_checkpoint()
            runtime = trainer.train(resume_from_checkpoint=True if resumed else None).metrics["train_runtime"]
        if stop.seen:
            return None
        if trainer.is_world_process_zero():
            clock = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EndByClock)]
            seconds = clock[0].seconds if clock else None if resumed else runtime  # unknown after an interruption
            done = dataclasses.replace(
                config,
                training=config.training | {"max_steps": trainer.state.global_step},
                trained_minutes=None if seconds is None else round(seconds / 60, 2),
            )
            save_model(model, tokenizer, done, output / CHECKPOINT)
        return output / CHECKPOINT


def training_arguments(config: RunConfig, output: Path, device: torch.device) -> GradMemTrainingArguments:
    """The training arguments of a run; nothing is compiled on a CPU."""
    cpu = device.type == "cpu"
    own: dict[str, Any] = {"torch_compile": False} if cpu else {"tf32": is_torch_tf32_available()}
    steps = {} if config.steps is None else {"max_steps": config.steps}
    return GradMemTrainingArguments(output_dir=str(output), use_cpu=cpu, **(DEFAULTS | steps | config.training | own))


def training_batches(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Batches:
    """The batches of a run: those that its task makes itself, or batches of the rows of all its tasks.

    Raises:
        ValueError: a task makes its own batches but is not the only task.
    """
    seed = config.training.get("seed", 0)
    write_steps = tuple(config.training.get("write_steps", ()))
    own = [made for task in config.tasks if (made := task.batches(seed, write_steps)) is not None]
    if own and len(config.tasks) > 1:
        raise ValueError("A task that makes its own batches cannot be mixed with others: keep only one in `tasks`.")
    if own:
        return own[0]
    options = {"seed": seed} | config.batches
    if config.method.context_per_query and "tokens" in options:
        options["tokens"] //= options.get("queries", 2)
    rows: Any = (
        load_pools(config.tokenized)
        if config.tokenized is not None
        else [(task.training_rows(), task.share) for task in config.tasks]
    )
    return RowBatches(rows, GradMemCollator(tokenizer, query_format=config.query_format), **options)


class LearningCurve(TrainerCallback):
    """Writes the logs of a run to a file.

    Args:
        path: a file of JSON lines, to which logs are appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add a line."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step} | (logs or {})) + "\n")
