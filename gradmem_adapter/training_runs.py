"""What `gradmem train` and `gradmem eval` do: a run from a recipe, a table from a checkpoint."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from .checkpoint import load_checkpoint
from .tasks import kv_results
from .tasks.kv_recipe import KVRecipe
from .tasks.kv_training import evaluate_kv, load_kv, save_kv, train_kv
from .tasks.rows import RowsRecipe, read_rows
from .training import GradMemTrainer, GradMemTrainingArguments
from .training.graphed_run import RunProgress

CHECKPOINT = "checkpoint"
"""The folder of the finished model in the directory of a run."""


def train(
    recipe: KVRecipe | RowsRecipe,
    output: Path,
    *,
    device: torch.device,
    max_minutes: float | None = None,
    console: Console | None = None,
) -> Path | None:
    """Run a recipe, or go on with it where it was interrupted, and save the model.

    Returns:
        Where the finished model is; None if `max_minutes` ended the run before.
    """
    console = console or Console()
    if max_minutes is not None and max_minutes <= 0:
        raise ValueError(f"max_minutes must be positive, got {max_minutes}.")
    seconds = math.inf if max_minutes is None else 60 * max_minutes
    if isinstance(recipe, RowsRecipe):
        return _train_rows(recipe, output, device, seconds, console)
    model = recipe.build()
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=recipe.steps)

        def show(now: RunProgress) -> None:
            progress.update(task, completed=now.step)
            for kind, values in sorted(now.means.items()):
                line = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
                progress.console.print(f"step {now.step}, {now.seconds:.0f} s, {kind}: {line}", markup=False)

        done = train_kv(model, recipe, output, device=device, max_seconds=seconds, log_every=100, callback=show)
    if not done:
        console.print(f"Stopped; the same command goes on from {output}.", markup=False)
        return None
    save_kv(model, recipe, output / CHECKPOINT)
    console.print(f"Saved: {output / CHECKPOINT}", markup=False)
    evaluate_pairs(output / CHECKPOINT, [4, 16, 64], [1, 5], contexts=64, device=device, console=console)
    return output / CHECKPOINT


class _Deadline(TrainerCallback):
    """Ends a run of the Trainer, with a checkpoint, after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.passed, self.start = seconds, False, 0.0

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if time.monotonic() - self.start > self.seconds and state.global_step < state.max_steps:
            self.passed = control.should_training_stop = control.should_save = True


def _train_rows(
    recipe: RowsRecipe, output: Path, device: torch.device, seconds: float, console: Console
) -> Path | None:
    trainer = recipe.trainer(output, cpu=device.type == "cpu")
    deadline = _Deadline(seconds)
    trainer.add_callback(deadline)
    trainer.train(resume_from_checkpoint=True if trainer.has_checkpoint() else None)
    if deadline.passed:
        console.print(f"Stopped; the same command goes on from {output}.", markup=False)
        return None
    trainer.save_model(str(output / CHECKPOINT))
    console.print(f"Saved: {output / CHECKPOINT}", markup=False)
    if recipe.evaluate is not None:
        _print_metrics({trainer.config.write_steps: trainer.evaluate()}, console)
    return output / CHECKPOINT


def evaluate_pairs(
    checkpoint: Path,
    pairs: list[int],
    steps: list[int],
    *,
    contexts: int,
    device: torch.device,
    seed: int = 1,
    results: Path | None = None,
    console: Console | None = None,
) -> list[kv_results.KVRecord]:
    """Greedy exact match on fresh pairs, for each number of pairs and of write steps, as a table."""
    console = console or Console()
    model, recipe = load_kv(checkpoint, device)
    if recipe.method == "full_context":
        steps = [0]  # there is nothing to write
    records = []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    with Progress(TextColumn("Evaluating"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        for n, k in progress.track([(n, k) for n in pairs for k in steps]):
            queries = min(16, n)
            value = evaluate_kv(model, n, k, contexts=contexts, queries=queries, seed=seed)
            records.append(
                kv_results.KVRecord(
                    method=recipe.method,
                    trained_steps=recipe.trained_steps,
                    pairs=n,
                    write_steps=k,
                    exact_match=value,
                    queries=contexts * queries,
                    seed=seed,
                    training_steps=recipe.steps,
                    device=name,
                )
            )
    console.print(kv_results.table(records))
    if results is not None:
        kv_results.add_records(results, records)
    return records


def evaluate_rows(
    checkpoint: Path, rows: Path, steps: list[int], *, device: torch.device, console: Console | None = None
) -> dict[int, dict[str, float]]:
    """Loss, exact match and F1 on a file of rows, for each number of write steps, as a table."""
    model, tokenizer = load_checkpoint(checkpoint, device=device, is_trainable=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    metrics = {}
    with tempfile.TemporaryDirectory() as scratch:
        for k in steps:
            arguments = GradMemTrainingArguments(
                scratch, eval_write_steps=k, report_to="none", use_cpu=device.type == "cpu"
            )
            trainer = GradMemTrainer(model, arguments, eval_dataset=read_rows(rows), processing_class=tokenizer)
            metrics[k] = trainer.evaluate()
    _print_metrics(metrics, console or Console())
    return metrics


def _print_metrics(metrics: dict[int, dict[str, float]], console: Console) -> None:
    names = ["eval_loss", "eval_exact_match", "eval_f1", "eval_write_loss_before", "eval_write_loss_after"]
    table = Table("write steps", *(name.removeprefix("eval_").replace("_", " ") for name in names))
    for k, values in metrics.items():
        table.add_row(str(k), *(f"{values[name]:.4f}" if name in values else "" for name in names))
    console.print(table)
