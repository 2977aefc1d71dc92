"""The commands of `python -m evaluation questions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmem_adapter.cli.options import DEVICE, chosen_device
from gradmem_adapter.cli.processes import end_of_run, meet, say_once

from .train import WriterRun, train_writer
from .write import Writing, write_questions

app = typer.Typer(no_args_is_help=True, help="Write training questions for texts that have none.")
TOKENS = typer.Option(min=1, help="The most tokens in a batch, including padding.")
LONGEST = typer.Option(min=1, help="The most tokens in a passage.")


@app.command()
def train(
    sources: Annotated[
        list[str], typer.Argument(help="KIND=SOURCE, such as story=data/fairytaleqa. Given twice, it counts twice.")
    ],
    output: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run is resumed.")],
    backbone: Annotated[str, typer.Option(help="All of its weights are trained.")] = WriterRun.backbone,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the passages.")] = WriterRun.epochs,
    learning_rate: Annotated[float, typer.Option(min=0, help="The peak learning rate.")] = WriterRun.learning_rate,
    tokens: Annotated[int, TOKENS] = WriterRun.tokens,
    longest: Annotated[int, LONGEST] = WriterRun.longest,
    seed: int = WriterRun.seed,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Train a writer on passages with questions."""
    run = WriterRun(
        [_kind_and_source(text) for text in sources], backbone, epochs, learning_rate, tokens, longest, seed
    )
    place = chosen_device(device)
    with meet(cpu=place.type == "cpu"):
        writer = train_writer(run, output, place)
    end_of_run(writer, output, "Let it write: python -m evaluation questions write")


@app.command()
def write(
    writer: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The output of `train`.")],
    source: Annotated[str, typer.Argument(help="A directory with train.txt.gz, one paragraph per line, or rows.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="A .jsonl.gz file; an interrupted run is resumed.")],
    kind: Annotated[str, typer.Option(help="The kind of the texts, one that the writer was trained on.")],
    split: Annotated[str, typer.Option(help="The split of the source.")] = Writing.split,
    limit: Annotated[int | None, typer.Option(min=1, help="The most passages.")] = Writing.limit,
    longest: Annotated[int, LONGEST] = Writing.longest,
    tokens: Annotated[int, TOKENS] = Writing.tokens,
    agreement: Annotated[float, typer.Option(min=0, max=1, help="The least F1 of both answers.")] = Writing.agreement,
    support: Annotated[float, typer.Option(max=0, help="The least mean log probability per token.")] = Writing.support,
    seed: int = Writing.seed,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Let a writer ask questions about texts, and keep those that it answers the same way twice."""
    writing = Writing(str(writer), source, kind, split, limit, longest, tokens, agreement, support, seed)
    place = chosen_device(device)
    with meet(cpu=place.type == "cpu"):
        write_questions(writing, output, place, typer.echo)
    say_once(f"Saved: {output}")


def _kind_and_source(text: str) -> tuple[str, str]:
    kind, sign, source = text.partition("=")
    if not (kind and sign and source):
        raise ValueError(f"A source must be KIND=SOURCE, such as story=data/fairytaleqa, got {text!r}.")
    return kind, source
