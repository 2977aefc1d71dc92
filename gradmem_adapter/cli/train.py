"""`gradmem train`: train an adapter on rows."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from gradmem_adapter.cli.options import DEVICE, JSON, chosen_device, print_json
from gradmem_adapter.cli.processes import end_of_run, meet
from gradmem_adapter.cli.train_config import LENGTH, TrainConfig
from gradmem_adapter.utils.fields import claimed, read_fields

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from peft import PeftModel

RUN, CHECKPOINT = "run.json", "checkpoint"
"""Names inside the directory of a run: its configuration, and the folder of the finished adapter."""
ROWS_HELP = """JSON lines, each with a context, and a query and its target or lists of queries and targets; optionally
answers: for each query, the texts that evaluation accepts."""


def train(
    rows: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help=ROWS_HELP)],
    output: Annotated[
        Path,
        typer.Option(help="Directory of the run, which is resumed if it exists; a finished run can be extended."),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A trained adapter to continue from, such as smollm2-135m-qa; default: a new one."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="As for ask; default: the checkpoint's, or SmolLM2-135M-Instruct.", show_default=False),
    ] = None,
    eval_rows: Annotated[
        Path | None, typer.Option("--eval", exists=True, dir_okay=False, help="Rows to evaluate the adapter on.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A YAML file: checkpoint or memory, training, ...")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value or outer.inner=value, overriding the file's. May be repeated."),
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Train an adapter on your own rows: contexts, and queries about them with their targets."""
    given = {"rows": rows, "eval_rows": eval_rows, "checkpoint": checkpoint, "backbone": backbone}
    fields = {name: str(value) for name, value in given.items() if value is not None}
    read = read_fields(config, setting or ())
    if twice := sorted(fields.keys() & {one.partition("=")[0].strip() for one in setting or ()}):
        raise ValueError(f"--set {twice[0]}=... repeats an option of the command line: leave one of them out.")
    plan = TrainConfig.of(read | fields)
    place = chosen_device(device)
    logs = redirect_stdout(sys.stderr) if as_json else nullcontext()  # the Trainer logs to stdout
    with logs, meet(cpu=place.type == "cpu") as processes:
        metrics = _train(plan, output, place, processes)
    if metrics is None:
        return
    if as_json:
        print_json({"checkpoint": str(output / CHECKPOINT), "metrics": metrics})
        return
    end_of_run(output / CHECKPOINT, output)
    if metrics:
        shown = ("loss", "exact_match", "f1", "first_write_loss", "last_write_loss")
        names = [name for name in shown if f"eval_{name}" in metrics]
        table = Table(*(name.replace("_", " ") for name in names), title=str(plan.eval_rows))
        table.add_row(*(f"{metrics[f'eval_{name}']:.4f}" for name in names))
        Console().print(table)


def _train(plan: TrainConfig, output: Path, place: torch.device, processes: PartialState) -> dict[str, float] | None:
    """Train, save and evaluate. Returns the metrics, or None in processes other than the first."""
    from gradmem_adapter import Card
    from gradmem_adapter.card import write_card
    from gradmem_adapter.naming import saved_config
    from gradmem_adapter.training.callbacks import StopOnSignal

    arguments, parent = plan.check(output, place), plan.parent()  # checked before the directory is claimed
    with claimed(output / RUN, dataclasses.asdict(plan), processes, may_change={"training": LENGTH}):
        trainer = plan.trainer(arguments)
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=True if trainer.has_checkpoint() else None)
        if stop.seen:
            end_of_run(None, output)
        trainer.save_model(str(output / CHECKPOINT))
        metrics = trainer.evaluate() if plan.eval_rows is not None else {}
        if not trainer.is_world_process_zero():
            return None
        config = saved_config(cast("PeftModel", trainer.model))
        about = Card(data=f"The rows of `{Path(plan.rows).name}`.", results=metrics, **parent)
        write_card(output / CHECKPOINT, config, about)
        return metrics
