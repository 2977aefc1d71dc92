"""What `gradmem train` and `gradmem eval` do: a run from a recipe, a table from a checkpoint."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from gradmem_adapter.utils.files import read_text, replacing

from .checkpoint import load_checkpoint
from .recipes import Recipe
from .tasks import kv_results, qa_results, reconstruction_results
from .tasks.kv_recipe import KVRecipe
from .tasks.kv_training import evaluate_kv, load_kv, save_kv, train_kv
from .tasks.qa_recipe import QARecipe
from .tasks.qa_training import Answerer, load_qa, train_qa
from .tasks.reconstruction import passages
from .tasks.records import Record, add_records, device_name, load_records, task_of
from .tasks.rows import RowsRecipe, read_rows
from .tasks.saved import RECIPE, claim_run, load_recipe_fields, save_model
from .training import GradMemTrainer, GradMemTrainingArguments
from .training.graphed_run import RunProgress, step_of
from .training.processes import joined, one_after_another, rank

CHECKPOINT = "checkpoint"
"""The folder of the finished model in the directory of a run."""


def train(
    recipe: Recipe,
    output: Path,
    *,
    device: torch.device,
    max_minutes: float | None = None,
    console: Console | None = None,
) -> Path | None:
    """Run a recipe, or go on with it where it was interrupted, and save the model.

    Processes that torchrun or accelerate launch started train one model together, each on a GPU of its own.

    Returns:
        Where the finished model is; None if `max_minutes` ended the run before.
    """
    if max_minutes is not None and max_minutes <= 0:
        raise ValueError(f"max_minutes must be positive, got {max_minutes}.")
    seconds = math.inf if max_minutes is None else 60 * max_minutes
    if isinstance(recipe, RowsRecipe):  # the Trainer brings its processes together by itself
        claim_run(recipe, output)
        return _train_rows(recipe, output, device, seconds, console or Console())
    with joined(device) as own:
        return _train_graphed(recipe, output, own, seconds, console or Console(quiet=rank() > 0))


def _train_graphed(
    recipe: KVRecipe | QARecipe, output: Path, device: torch.device, seconds: float, console: Console
) -> Path | None:
    with one_after_another():
        claim_run(recipe, output)
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=recipe.steps)

        def show(now: RunProgress) -> None:
            progress.update(task, completed=now.step)
            for kind, values in sorted(now.means.items()):
                line = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
                progress.console.print(f"step {now.step}, {now.seconds:.0f} s, {kind}: {line}", markup=False)

        options: dict[str, Any] = {"device": device, "max_seconds": seconds, "callback": show}
        try:
            if isinstance(recipe, QARecipe):
                model, tokenizer = recipe.build()
                done = train_qa(model, tokenizer, recipe, output, log_every=20, **options)
            else:
                model = recipe.build()
                done = train_kv(model, recipe, output, log_every=100, **options)
        except KeyboardInterrupt:
            console.print(f"Interrupted; the same command goes on from {output}.", markup=False)
            raise
    if not done:
        console.print(f"Stopped; the same command goes on from {output}.", markup=False)
        return None
    checkpoint = output / CHECKPOINT
    if rank() > 0:  # process 0 saves and evaluates
        return checkpoint
    if isinstance(recipe, QARecipe):
        save_model(model, tokenizer, replace(recipe, steps=step_of(output / "last")), checkpoint)
        console.print(f"Saved: {checkpoint}", markup=False)
        steps = [max(recipe.write_steps)]
        try:
            evaluate_answers(checkpoint, steps, [1], split="valid", limit=100, device=device, console=console)
        except (ValueError, OSError, ImportError) as error:  # the model is there, whatever the held-out data are
            console.print(f"Not evaluated: {error}", markup=False)
        return checkpoint
    save_kv(model, recipe.ended_at(step_of(output / "last")), checkpoint)
    console.print(f"Saved: {checkpoint}", markup=False)
    evaluate_pairs(checkpoint, [4, 16, 64], [1, 5], contexts=64, device=device, console=console)
    return checkpoint


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
        _print_metrics({trainer.default_write_steps: trainer.evaluate()}, console)
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
    with Progress(TextColumn("Evaluating"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        for n, k in progress.track([(n, k) for n in pairs for k in steps]):
            queries = min(16, n)
            value = evaluate_kv(model, n, k, contexts=contexts, queries=queries, seed=seed)
            record = kv_results.KVRecord(
                method=recipe.method,
                trained_steps=recipe.trained_steps,
                pairs=n,
                write_steps=k,
                exact_match=value,
                queries=contexts * queries,
                seed=seed,
                training_steps=recipe.steps,
                device=device_name(device),
            )
            records.append(record)
            _keep(results, kv_results.TASK, record)
    console.print(kv_results.table(records))
    return records


def evaluate_answers(
    checkpoint: Path,
    steps: list[int],
    states: list[int],
    *,
    names: Sequence[str] | None = None,
    split: str = "test",
    limit: int | None = None,
    device: torch.device,
    seed: int = 0,
    results: Path | None = None,
    answers: Path | None = None,
    console: Console | None = None,
) -> list[qa_results.QARecord]:
    """Greedy answers on a split of the checkpoint's sources, scored, as tables.

    Args:
        steps: numbers of write steps (or passes).
        states: how many contexts each question is asked of.
        names: of the sources to answer, as tables name them; None: all.
        limit: only so many contexts of a source; a part of the data is no result to be kept.
        results: a JSON file that the records are added to.
        answers: a file for every question with its answer and its scores, one JSON object a line; the same questions
            come in the same order for every checkpoint, so that two can be compared in pairs.
    """
    if results is not None and limit is not None:
        raise ValueError(f"{results} keeps results on all of the data: leave --limit or --results out.")
    console = console or Console()
    recipe = QARecipe.of(load_recipe_fields(checkpoint))
    sources = [source for source in recipe.sources if not source.text]  # plain text has no answers to be right about
    if unknown := sorted(set(names or ()) - {source.name for source in sources}):
        raise ValueError(
            f"{checkpoint} was not trained on {', '.join(unknown)}; its sources are "
            f"{', '.join(source.name for source in sources)}."
        )
    model, tokenizer, _ = load_qa(checkpoint, device)
    if recipe.method not in ("gradmem", "forward_memory"):
        steps = [1]  # there is nothing to write
    records: list[qa_results.QARecord] = []
    lines: list[str] = []
    for source in sources:
        if names is not None and source.name not in names:
            continue
        rows = list(source.rows(split))[:limit]
        for k in steps:
            answerer = Answerer(model, tokenizer, recipe, steps=k)
            for count in states:
                shown: list[dict[str, Any]] = []
                record = qa_results.measure(
                    answerer, rows, source.name, split=split, states=count, seed=seed, show=shown.append
                )
                records.append(record)
                _keep(results, qa_results.TASK, record)
                if answers is not None:
                    what = {"dataset": source.name, "split": split, "write_steps": record.write_steps, "states": count}
                    lines += [json.dumps(what | line, ensure_ascii=False) + "\n" for line in shown]
                    with replacing(answers) as temporary:
                        temporary.write_text("".join(lines), encoding="utf-8")
                done = (
                    f"{source.name}, K={k}, {count} contexts: {record.questions} questions, F1 {100 * record.f1:.1f} %"
                )
                console.print(done, markup=False)
    for table in qa_results.tables(records):
        console.print(table)
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


def evaluate_text(
    checkpoint: Path,
    text: Path,
    steps: list[int],
    *,
    tokens: int = 128,
    count: int = 64,
    optimizer: str | None = None,
    lr: float | None = None,
    device: torch.device,
    results: Path | None = None,
    console: Console | None = None,
) -> list[reconstruction_results.ReconstructionRecord]:
    """How much of the first passages of a text comes back from memory, for each number of write steps, as a table.

    Args:
        tokens: of a passage.
        count: how many passages.
        optimizer, lr: of WRITE; None: the adapter's own.
        results: a JSON file that the records are added to.
    """
    console = console or Console()
    model, tokenizer = load_checkpoint(checkpoint, device=device)
    texts = passages(read_text(text), tokenizer, tokens, count)
    records = []
    with Progress(TextColumn("Evaluating"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        for k in progress.track(steps):
            record = reconstruction_results.measure(
                model, texts, checkpoint=_name_of(checkpoint), text=text.name, steps=k, optimizer=optimizer, lr=lr
            )
            records.append(record)
            _keep(results, reconstruction_results.TASK, record)
    for table in reconstruction_results.tables(records):
        console.print(table)
    return records


def _keep(results: Path | None, task: str, record: Record) -> None:
    """Add a record to the file of results at once: an evaluation that is cut short keeps what it has measured."""
    if results is not None:
        add_records(results, task, type(record), [record])


def _name_of(checkpoint: Path) -> str:
    """The name of a checkpoint's directory; with that of its run, where all runs give their checkpoints the same."""
    path = checkpoint.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith(CHECKPOINT) else path.name


def _print_metrics(metrics: dict[int, dict[str, float]], console: Console) -> None:
    names = ["eval_loss", "eval_exact_match", "eval_f1", "eval_first_write_loss", "eval_last_write_loss"]
    table = Table("write steps", *(name.removeprefix("eval_").replace("_", " ") for name in names))
    for k, values in metrics.items():
        table.add_row(str(k), *(f"{values[name]:.4f}" if name in values else "" for name in names))
    console.print(table)


def trained_on(checkpoint: Path) -> str | None:
    """The task of the recipe in a checkpoint; None where there is no recipe."""
    file = checkpoint / RECIPE
    return json.loads(file.read_text(encoding="utf-8")).get("task") if file.is_file() else None


def show_results(results: Path, output: Path, console: Console | None = None) -> None:
    """Print the tables of a file of results, and draw its plots into the directory `output`."""
    console = console or Console()
    if task_of(results) == qa_results.TASK:
        answers = load_records(results, qa_results.TASK, qa_results.QARecord)
        for table in qa_results.tables(answers):
            console.print(table)
        files = qa_results.plot(answers, output)
    elif task_of(results) == reconstruction_results.TASK:
        texts = load_records(results, reconstruction_results.TASK, reconstruction_results.ReconstructionRecord)
        for table in reconstruction_results.tables(texts):
            console.print(table)
        files = reconstruction_results.plot(texts, output)
    else:
        pairs = load_records(results, kv_results.TASK, kv_results.KVRecord)
        console.print(kv_results.table(pairs, paper=True))
        files = kv_results.plot(pairs, output)
    for file in files:
        console.print(f"Drawn: {file}", markup=False)
