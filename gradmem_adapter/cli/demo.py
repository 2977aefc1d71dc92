"""`gradmem demo`: what a memory state holds, shown on a paragraph, a story or key-value pairs."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gradmem_adapter.backbones import SMOLLM2
from gradmem_adapter.cli.demos.key_values import run_key_value_demo
from gradmem_adapter.cli.demos.recite import demo_text, run_recite_demo
from gradmem_adapter.cli.demos.story import run_story_demo
from gradmem_adapter.cli.options import CHECKPOINTS, JSON, QA_CHECKPOINT, print_json


class DemoTask(str, Enum):
    """What `gradmem demo` shows."""

    recite = "recite"
    kv = "kv"


def demo(
    task: Annotated[DemoTask, typer.Option(help="Recite a paragraph, or retrieve values by key.")] = DemoTask.recite,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="recite: a file; default: one that ships.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="recite: a local directory, a hub id, or package:<package>/<file>.gguf.")
    ] = SMOLLM2,
    memory_tokens: Annotated[
        int | None, typer.Option(help="recite: memory vectors; at most a quarter of the tokens; default: a fifth.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Write steps; recite: 300 at most, kv: 5.")] = None,
    lr: Annotated[float, typer.Option(help="recite: write learning rate of Adam.")] = 0.03,
    checkpoint: Annotated[
        Path | None, typer.Option(help="kv, --ask: trained weights; default: those in checkpoints/ of the source tree.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="kv: pairs in the context.")] = 16,
    ask: Annotated[
        bool, typer.Option(help="recite: then also three questions about a story, by an adapter trained on questions.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the first memory, or of the pairs.")] = 0,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a context into a few vectors, forget it, and answer from them.

    Recite: exit status 1 if the paragraph does not come back.
    """
    console = Console(quiet=as_json)
    if ask and task is DemoTask.kv:
        raise ValueError("--ask belongs to the task recite: leave one of them out.")
    figures: dict[str, dict[str, Any]] = {}
    if task is DemoTask.kv:
        checkpoint = checkpoint or CHECKPOINTS / "kv-retrieval"
        steps = 5 if steps is None else steps
        figures["demo"] = run_key_value_demo(checkpoint, pairs=pairs, steps=steps, seed=seed, console=console)
    else:
        recited = run_recite_demo(
            demo_text(text),
            backbone=backbone,
            memory_tokens=memory_tokens,
            steps=300 if steps is None else steps,
            lr=lr,
            seed=seed,
            console=console,
        )
        if ask:
            figures["ask"] = run_story_demo(checkpoint or QA_CHECKPOINT, console=console)
        figures["demo"] = recited
    if as_json:
        print_json(figures)
    for name, found in figures.items():
        console.print(f"{name}: {json.dumps(found)}", soft_wrap=True, highlight=False, markup=False)
    if not figures["demo"].get("reconstructed", True):
        raise typer.Exit(1)
