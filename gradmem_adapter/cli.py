"""The `gradmem` command, thin over the API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gradmem_adapter.utils.files import check_writable, read_text

from .backbones import SMOLLM2

app = typer.Typer(
    help="Write long contexts into a few vectors by gradient descent, and answer from them (GradMem).",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


class DemoTask(str, Enum):
    """What `gradmem demo` shows."""

    recite = "recite"
    kv = "kv"


DEVICE = typer.Option(help="Where to run; default: the GPU if there is one.", show_default=False)


@contextmanager
def _errors_of(command: str) -> Iterator[None]:
    """Wrong input ends the command with a line and exit status 2, not with a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, torch.cuda.OutOfMemoryError) as error:
        Console(stderr=True).print(f"gradmem {command}: {error}", style="red", markup=False)
        raise typer.Exit(2) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"There is no device {name!r}; use cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA GPU here; use --device cpu.")
    return device


@app.command()
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
) -> None:
    """Write a context into a few vectors, forget it, and answer from them.

    Recite: exit status 1 if the paragraph does not come back.
    """
    with _errors_of("demo"):
        if ask and task is DemoTask.kv:
            raise ValueError("--ask belongs to the task recite: leave one of them out.")
        if task is DemoTask.kv:
            from .kv_demo import CHECKPOINT, run_kv_demo

            run_kv_demo(checkpoint or CHECKPOINT, pairs=pairs, steps=5 if steps is None else steps, seed=seed)
            return
        from .demo import demo_text, run_demo

        result = run_demo(
            demo_text(text),
            backbone=backbone,
            memory_tokens=memory_tokens,
            steps=300 if steps is None else steps,
            lr=lr,
            seed=seed,
        )
        if ask:
            from .ask_demo import run_ask_demo
            from .asking import CHECKPOINT as ASK_CHECKPOINT

            run_ask_demo(checkpoint or ASK_CHECKPOINT)
    if not result.reconstructed:
        raise typer.Exit(1)


@app.command()
def write(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Texts in UTF-8, one context each.")],
    checkpoint: Annotated[Path, typer.Option(exists=True, file_okay=False, help="What `gradmem train` made.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="The file for the memory states, in order.")],
    steps: Annotated[int | None, typer.Option(help="Write steps; default: the checkpoint's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens at once; default: what memory allows.")] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Write texts into one memory state each, all in one file."""
    from rich.markup import escape
    from rich.table import Table

    from .checkpoint import load_checkpoint
    from .pipeline import GradMemPipeline

    with _errors_of("write"):
        check_writable(output)
        texts = [_text(file) for file in files]
        pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=_device(device)))
        states = pipeline.write_many(texts, steps=steps, max_tokens=max_tokens)
        states.save(output)
    table = Table("file", "tokens", "bytes", "last write loss")
    for file, state in zip(files, states, strict=True):
        loss = state.write_losses[0, -1].item()
        table.add_row(escape(str(file)), str(int(state.context_tokens)), str(state.nbytes), f"{loss:.4f}")
    Console().print(table)


@app.command()
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
    from .recipes import load_recipe
    from .training.errors import TrainingDiverged
    from .training_runs import train as run

    with _errors_of("train"):
        try:
            run(load_recipe(recipe, setting or ()), output, device=_device(device), max_minutes=max_minutes)
        except TrainingDiverged as error:
            Console(stderr=True).print(f"gradmem train: {error}", style="red", markup=False)
            raise typer.Exit(1) from error


@app.command(name="eval")
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
    from .training_runs import evaluate_answers, evaluate_pairs, evaluate_rows, evaluate_text, trained_on

    with _errors_of("eval"):
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
                device=_device(device),
            )
            return
        of_questions = rows is None and trained_on(checkpoint) == "answers"
        if not of_questions:
            _refuse(context, _OF_ANSWERS, "is for models of questions about texts alone: leave it out.")
        if rows is not None or of_questions:
            _refuse(context, _OF_PAIRS, "is for key-value retrieval alone: leave it out.")
        if rows is not None:
            evaluate_rows(checkpoint, rows, _numbers("--steps", steps), device=_device(device))
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
                device=_device(device),
            )
            return
        evaluate_pairs(
            checkpoint,
            _numbers("--pairs", pairs),
            _numbers("--steps", steps),
            contexts=contexts,
            seed=seed,
            results=results,
            device=_device(device),
        )


@app.command()
def ask(
    questions: Annotated[list[str], typer.Argument(help="Questions, each answered by itself.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A file to ask about; several are read side by side."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A trained adapter; default: checkpoints/smollm2-135m-qa of the source tree.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Keep the memory in this file, or ask the one that was kept, without the text.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Write steps; default: the adapter's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Write texts into memory, drop them, and answer questions from the memory alone."""
    from .asking import CHECKPOINT
    from .asking import ask as run

    with _errors_of("ask"):
        texts = [_text(file).strip() for file in text or ()]
        run(
            checkpoint or CHECKPOINT,
            texts,
            questions,
            state=state,
            steps=steps,
            max_new_tokens=max_new_tokens,
            device=_device(device),
        )


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSON file that `eval` made.")],
    output: Annotated[Path | None, typer.Option(help="Directory of the plots; default: that of the results.")] = None,
) -> None:
    """Print the tables of a file of results (key-value retrieval beside the paper's), and draw its plots."""
    from .training_runs import show_results

    with _errors_of("plot"):
        show_results(results, output or results.parent)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `eval --answers` made.")],
    second: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The same of another model.")],
) -> None:
    """How much better a model answers the same questions than another, in pairs, with standard errors."""
    from .tasks.qa_pairs import compare as run

    with _errors_of("compare"):
        Console().print(run(first, second))


def _text(file: Path) -> str:
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty: there is nothing to write.")
    return text


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


if __name__ == "__main__":  # as torchrun starts it: `torchrun -m gradmem_adapter.cli`
    app()
