"""`gradmem demo`: shows what a memory state holds, with a paragraph, a story or key-value pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from gradmem_adapter.cli.options import BACKBONE, JSON, check_used, print_json
from gradmem_adapter.utils.shipped import KEY_VALUES, QA

TASK = """recite: a paragraph comes back word by word. ask: questions about a story, answered or refused. tour: both.
kv: values are found by their keys."""

_OPTIONS = {
    ("recite", "tour"): ("text", "memory_tokens"),
    ("ask", "kv", "tour"): ("checkpoint",),
    ("recite", "kv", "tour"): ("steps", "seed"),
    ("kv",): ("pairs",),
}
"""The tasks that each option applies to."""


def demo(
    context: typer.Context,
    task: Annotated[Literal["tour", "recite", "ask", "kv"], typer.Option(help=TASK)] = "tour",
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="recite: a text file; default: one that ships with the package."
        ),
    ] = None,
    backbone: Annotated[str | None, BACKBONE] = None,
    memory_tokens: Annotated[
        int | None,
        typer.Option(help="recite: number of memory vectors, at most a quarter of the tokens; default: a fifth."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Write steps; default: at most 300 for recite, 5 for kv.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help=f"ask, kv: a trained adapter; default: {QA}, {KEY_VALUES}.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="kv: number of pairs in the context.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first memory, or of the pairs.")] = 0,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a context into a few vectors, forget it, and answer from them. Takes about a minute.

    Exit status 1 if the paragraph does not come back.
    """
    for tasks, names in _OPTIONS.items():
        needed = " or ".join(f"--task {one}" for one in tasks)
        check_used(context, needed, task in tasks, *names)
    from gradmem_adapter import SMOLLM2
    from gradmem_adapter.cli.demos.key_values import run_key_value_demo
    from gradmem_adapter.cli.demos.recite import demo_text, run_recite_demo
    from gradmem_adapter.cli.demos.story import run_story_demo

    console = Console(quiet=as_json)
    figures: dict[str, dict[str, Any]] = {}
    if task == "kv":
        steps = 5 if steps is None else steps
        figures["kv"] = run_key_value_demo(
            KEY_VALUES if checkpoint is None else checkpoint,
            backbone=backbone,
            pairs=pairs,
            steps=steps,
            seed=seed,
            console=console,
        )
    if task in ("recite", "tour"):
        figures["recite"] = run_recite_demo(
            demo_text(text),
            backbone=SMOLLM2 if backbone is None else backbone,
            memory_tokens=memory_tokens,
            steps=300 if steps is None else steps,
            seed=seed,
            console=console,
        )
    if task in ("ask", "tour"):
        figures["ask"] = run_story_demo(QA if checkpoint is None else checkpoint, backbone=backbone, console=console)
    if as_json:
        print_json(figures)
    if not figures.get("recite", {}).get("reconstructed", True):
        raise typer.Exit(1)
