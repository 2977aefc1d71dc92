"""`gradmem eval`, `plot` and `compare`: measurements of trained models, and what they show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradmem_adapter.cli.options import DEVICE, chosen_device, errors_of
from gradmem_adapter.utils.files import check_writable


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `gradmem train` made.")],
    rows: Annotated[
        Path | None, typer.Option(help="A file of rows; default: fresh pairs of key-value retrieval.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A text (.gz or not): how much of it comes back from memory."),
    ] = None,
    pairs: Annotated[str, typer.Option(help="Numbers of pairs.")] = "4,8,16,32,64,96",
    steps: Annotated[str, typer.Option(help="Numbers of write steps.")] = "1,2,5",
    contexts: Annotated[int, typer.Option(min=1, help="Contexts for each number of pairs.")] = 128,
    results: Annotated[Path | None, typer.Option(help="A JSON file that the results are added to.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pairs, and of the other contexts with --states.")] = 1,
    split: Annotated[str, typer.Option(help="answers: the part of the data to answer questions on.")] = "test",
    states: Annotated[str, typer.Option(help="answers: how many contexts a question is asked of.")] = "1",
    limit: Annotated[int | None, typer.Option(min=1, help="answers: only so many contexts of each source.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help='answers: only this source, as tables name it ("babi 2"). May be repeated; default: all.'),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="answers: a file for every answer with its scores, one JSON object a line."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="--text: tokens of a passage.")] = 128,
    passages: Annotated[int, typer.Option(min=1, help="--text: how many passages, one after another.")] = 64,
    optimizer: Annotated[
        str | None, typer.Option(help="--text: write optimizer, sgd or adam; default: the adapter's.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="--text: write learning rate of every step; default: the adapter's.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Measure a trained model and print a table."""
    from gradmem_adapter.training_runs import evaluate_answers, evaluate_pairs, evaluate_rows, evaluate_text, trained_on

    with errors_of("eval"):
        if text is None:
            _refuse(context, _OF_TEXT, "belongs to --text: give a text, or leave it out.")
        else:
            _refuse(
                context, ("rows", "seed", *_OF_PAIRS, *_OF_ANSWERS), "does not apply to --text: leave one of them out."
            )
        if results is not None:
            if rows is not None:
                raise ValueError("--results keeps results of recipes' tasks, not of --rows: leave one of them out.")
            results.parent.mkdir(parents=True, exist_ok=True)
            check_writable(results)
        if text is not None:
            evaluate_text(
                checkpoint,
                text,
                _numbers("--steps", steps),
                tokens=tokens,
                count=passages,
                optimizer=optimizer,
                lr=lr,
                results=results,
                device=chosen_device(device),
            )
            return
        of_questions = rows is None and trained_on(checkpoint) == "answers"
        if not of_questions:
            _refuse(context, _OF_ANSWERS, "is for models of questions about texts alone: leave it out.")
        if rows is not None or of_questions:
            _refuse(context, _OF_PAIRS, "is for key-value retrieval alone: leave it out.")
        if rows is not None:
            evaluate_rows(checkpoint, rows, _numbers("--steps", steps), device=chosen_device(device))
            return
        if of_questions:
            if answers is not None:
                check_writable(answers)
            evaluate_answers(
                checkpoint,
                _numbers("--steps", steps),
                _numbers("--states", states),
                names=source or None,
                split=split,
                limit=limit,
                seed=seed,
                results=results,
                answers=answers,
                device=chosen_device(device),
            )
            return
        evaluate_pairs(
            checkpoint,
            _numbers("--pairs", pairs),
            _numbers("--steps", steps),
            contexts=contexts,
            seed=seed,
            results=results,
            device=chosen_device(device),
        )


def plot(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSON file that `eval` made.")],
    output: Annotated[Path | None, typer.Option(help="Directory of the plots; default: that of the results.")] = None,
) -> None:
    """Print the tables of a file of results (key-value retrieval beside the paper's), and draw its plots."""
    from gradmem_adapter.training_runs import show_results

    with errors_of("plot"):
        show_results(results, output or results.parent)


def compare(
    first: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `eval --answers` made.")],
    second: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The same of another model.")],
) -> None:
    """How much better a model answers the same questions than another, in pairs, with standard errors."""
    from gradmem_adapter.tasks.qa_pairs import compare as run

    with errors_of("compare"):
        Console().print(run(first, second))


# What `gradmem eval` takes for one kind of measurement alone.
_OF_TEXT = ("tokens", "passages", "optimizer", "lr")
_OF_PAIRS = ("pairs", "contexts")
_OF_ANSWERS = ("split", "states", "limit", "source", "answers")


def _refuse(context: typer.Context, options: Iterable[str], why: str) -> None:
    """Raise `ValueError` if one of the options, none of which applies, was given."""
    for option in options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{option} {why}")


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} takes integers with commas between them, as in 1,2,5, got {text!r}.") from error
    if min(numbers) < 0:
        raise ValueError(f"{option} cannot be negative, got {text!r}.")
    return numbers
