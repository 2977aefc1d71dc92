"""The commands of `python -m evaluation`, a thin layer over its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmem_adapter.cli.errors import DEBUG, Commands
from gradmem_adapter.cli.options import DEVICE, chosen_device
from gradmem_adapter.cli.processes import end_of_run, meet
from gradmem_adapter.training import RowBatches
from gradmem_adapter.training.pools import save_pools
from gradmem_adapter.utils.files import check_writable
from gradmem_adapter.utils.wording import counted

from .backbones.sweep import sweep
from .compare import compare as compare_answers
from .config import Evaluation, RunConfig, task_of
from .models import load_config, tokenizer_of
from .plots import draw_all
from .questions.cli import app as questions
from .results import RESULTS, Record
from .run import evaluate
from .tables import ROOT, fill, markdown, results_table
from .tasks import KVRetrieval, Reconstruction, Task
from .train import train as train_run
from .train import training_batches
from .variants import check_all

app = typer.Typer(
    name="evaluation",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(questions, name="questions")
SETTING = typer.Option("--set", help="field=value or outer.inner=value, overriding the file's. May be repeated.")


@app.callback()
def main(debug: Annotated[bool, DEBUG] = False) -> None:
    """Reproduce every number: train from a recipe, measure, compare, and make the tables and plots."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file of evaluation/recipes.")],
    output: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run is resumed.")],
    settings: Annotated[list[str] | None, SETTING] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Train a model by a recipe."""
    config, place = RunConfig.load(recipe, settings or ()), chosen_device(device)
    with meet(cpu=place.type == "cpu"):
        checkpoint = train_run(config, output, place)
    end_of_run(checkpoint, output, "Measure it: python -m evaluation run")


@app.command()
def tokenize(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file of evaluation/recipes.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="A file for `train --set tokenized=FILE`.")],
    settings: Annotated[list[str] | None, SETTING] = None,
) -> None:
    """Tokenize the training data of a recipe once, for several runs on the same tasks and buckets."""
    check_writable(output)
    config = RunConfig.load(recipe, settings or ())
    batches = training_batches(config, tokenizer_of(config))
    if not isinstance(batches, RowBatches):
        raise ValueError(f"{recipe} generates its batches during training: there is nothing to tokenize.")
    save_pools(batches.pools, output)
    typer.echo(
        "\n".join(
            f"{counted(len(pool.contexts), 'context')} of up to {counted(pool.length, 'token')}"
            for pool in batches.pools
        )
    )


@app.command()
def run(
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, help="The output of `train`; or a recipe, to measure its untrained model.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(help='"{name: babi, source: data/babi, number: 2}". Repeatable; default: as the checkpoint says.'),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Measure key-value retrieval with these numbers of pairs, such as 16,32.")
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(min=1, help=f"--pairs: contexts for each number of pairs; default: {KVRetrieval.contexts}."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(exists=True, help="Measure how much of this text comes back from memory.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help='Only this data set, named as in tables ("babi 2").')] = None,
    steps: Annotated[str | None, typer.Option(help="Numbers of write steps, such as 1,2,5.")] = None,
    states: Annotated[str | None, typer.Option(help="How many contexts a question is asked of, such as 1,2.")] = None,
    split: Annotated[str | None, typer.Option(help="The split of the data.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most contexts from each data set.")] = None,
    results: Annotated[Path | None, typer.Option(dir_okay=False, help="A file to add the results to.")] = None,
    answers: Annotated[Path | None, typer.Option(dir_okay=False, help="A file for every answer.")] = None,
    seed: Annotated[int, typer.Option(help="--states: seed for drawing the other contexts.")] = 0,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Measure a trained model, and print a table."""
    config = load_config(checkpoint)
    if contexts is not None and pairs is None:
        raise ValueError("--contexts is the number of contexts for each of --pairs. Pass --pairs, too.")
    tasks: list[Task] = [task_of(fields) for fields in task or ()]
    contexts = contexts or KVRetrieval.contexts
    tasks += [KVRetrieval(pairs=n, contexts=contexts) for n in _numbers("--pairs", pairs) or ()]
    tasks += [] if text is None else [Reconstruction(text=str(text))]
    tasks = tasks or [t for t in config.evaluation.tasks or config.tasks if t.measured]
    if unknown := sorted(set(only or ()) - {t.dataset for t in tasks}):
        raise ValueError(f"There is no data set {', '.join(unknown)}; there are {', '.join(t.dataset for t in tasks)}.")
    evaluation = Evaluation(
        tasks=tuple(t for t in tasks if not only or t.dataset in only),
        write_steps=_numbers("--steps", steps) or config.evaluation.write_steps,
        states=_numbers("--states", states) or config.evaluation.states,
        split=split or config.evaluation.split,
    )
    for path in (results, answers):
        if path is not None:
            check_writable(path)
    found = evaluate(
        checkpoint, device=chosen_device(device), evaluation=evaluation, limit=limit, seed=seed, results=results,
        answers=answers, show=typer.echo,
    )  # fmt: skip
    for name in dict.fromkeys(record.task for record in found):
        typer.echo("\n" + markdown(results_table(record for record in found if record.task == name)))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The file of `run --answers`.")],
    second: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The same for another model.")],
) -> None:
    """Compare two models' answers to the same questions, in pairs, with standard errors."""
    typer.echo(markdown(compare_answers(first, second)))


@app.command()
def models(
    model_types: Annotated[
        list[str] | None, typer.Argument(help="Values of config.model_type; default: all that were not checked yet.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many to check at a time.")] = 1,
    limit: Annotated[float, typer.Option(min=1, help="The most seconds for one.")] = 300.0,
    results: Annotated[Path, typer.Option(dir_okay=False, help="The file of results.")] = RESULTS / "models.jsonl",
) -> None:
    """Check a tiny model of every causal LM of the installed Transformers; an interrupted run is resumed."""
    check_writable(results)
    _fail_where_wrong(sweep(results, model_types or (), jobs, limit, typer.echo))


@app.command()
def variants(
    only: Annotated[list[str] | None, typer.Argument(help="Names from the table; default: all.")] = None,
    results: Annotated[Path, typer.Option(dir_okay=False, help="The file of results.")] = RESULTS / "variants.jsonl",
) -> None:
    """Check every way to load a backbone: dtypes, attention, compilation, placement, quantisation."""
    check_writable(results)
    _fail_where_wrong(check_all(results, only or (), typer.echo))


@app.command()
def tables(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit status 1 if a table differs.")] = False,
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ are.")] = ROOT,
) -> None:
    """Fill every `<!-- table: NAME -->` block of README.md and docs/ from the result files."""
    changed = fill(root, write=not check)
    for place in changed:
        typer.echo(f"{'differs' if check else 'filled'}: {place}")
    if check and changed:
        typer.secho("These tables differ from the result files. Run `python -m evaluation tables`.", fg="red", err=True)
        raise typer.Exit(1)


@app.command()
def plots(
    output: Annotated[Path, typer.Option(help="Directory of the PNG files.")] = RESULTS / "plots",
) -> None:
    """Draw all plots from the result files."""
    for path in draw_all(output):
        typer.echo(f"Drawn: {path}")


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} must be integers separated by commas, such as 1,2,5, got {text!r}.") from error
    if min(numbers) < 0:
        raise ValueError(f"{option} must not be negative, got {text!r}.")
    return numbers


def _fail_where_wrong(found: list[Record]) -> None:
    if wrong := [record.dataset for record in found if record.facts["verdict"] in ("wrong", "crashes")]:
        typer.secho(f"Wrong, or crash after attaching: {', '.join(wrong)}", fg="red", err=True)
        raise typer.Exit(1)
