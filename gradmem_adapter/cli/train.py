"""`gradmem train`: a recipe in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradmem_adapter.cli.options import DEVICE, chosen_device, errors_of


def train(
    output: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run goes on where it was.")],
    recipe: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="A YAML file, as in examples/.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value or outer.inner=value, in the place of the file's. May be repeated."),
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop and save after so much training.")] = None,
) -> None:
    """Meta-train a model as a recipe says; `task` in it is kv_retrieval, answers or rows (texts in a file)."""
    from gradmem_adapter.recipes import load_recipe
    from gradmem_adapter.training.errors import TrainingDiverged
    from gradmem_adapter.training_runs import train as run

    with errors_of("train"):
        try:
            run(load_recipe(recipe, setting or ()), output, device=chosen_device(device), max_minutes=max_minutes)
        except TrainingDiverged as error:
            Console(stderr=True).print(f"gradmem train: {error}", style="red", markup=False)
            raise typer.Exit(1) from error
