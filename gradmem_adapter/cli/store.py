"""`gradmem store`: inspect, check and repair a memory store."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gradmem_adapter.cli.options import JSON, check_source, existing_store, in_words, print_json, visible
from gradmem_adapter.utils.wording import counted

if TYPE_CHECKING:
    from gradmem_adapter import MemoryStore
    from gradmem_adapter.store import Entry, Report

app = typer.Typer(help="Inspect and repair a memory store.", no_args_is_help=True)

DIR = typer.Argument(file_okay=False, help="The memory store, made by `gradmem write --store`.")
SHOWN = 60
"""The most characters of a text shown in a table."""
_SAID = {"nbytes": "bytes"}
"""Labels for fields whose names are meant for programs."""


@app.command("list")
def list_sources(folder: Annotated[Path, DIR], as_json: Annotated[bool, JSON] = False) -> None:
    """List the sources, and how much of each is stored."""
    rows = []
    for source, group in itertools.groupby(existing_store(folder).entries(), lambda entry: entry.source):
        entries = list(group)
        sizes = {"tokens": sum(entry.tokens for entry in entries), "nbytes": sum(entry.nbytes for entry in entries)}
        rows.append({"source": source, "states": len(entries), **sizes})
    _print_rows(rows, {"sources": rows}, as_json)


@app.command()
def show(
    folder: Annotated[Path, DIR],
    name: Annotated[str, typer.Argument(help="A source, or the key of a state.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show the states of a source, or one state by its key."""
    store = existing_store(folder)
    entries = list(store.entries(name)) or [entry for entry in store.entries() if entry.key == name]
    if not entries:
        raise ValueError(
            f"{folder} has neither a source nor a state {name!r}. `gradmem store list {folder}` shows its sources."
        )
    rows = [
        {
            "key": entry.key,
            "place": in_words([asdict(entry)]),
            "tokens": entry.tokens,
            "model": entry.fingerprint,
            "written": datetime.fromtimestamp(entry.written).isoformat(" ", "seconds"),
            "text": _beginning(entry),
        }
        for entry in entries
    ]
    _print_rows(rows, {"states": [asdict(entry) for entry in entries]}, as_json)


@app.command()
def verify(folder: Annotated[Path, DIR], as_json: Annotated[bool, JSON] = False) -> None:
    """Read every state and compare it with the index; exit status 1 if one cannot be read or found."""
    store = existing_store(folder)
    _print_report(store, store.verify(), as_json)


@app.command()
def rebuild(folder: Annotated[Path, DIR], as_json: Annotated[bool, JSON] = False) -> None:
    """Rebuild the index from the states, for instance if it is damaged; exit status 1 as for verify."""
    store = existing_store(folder)
    _print_report(store, store.rebuild(), as_json)


@app.command()
def gc(folder: Annotated[Path, DIR], as_json: Annotated[bool, JSON] = False) -> None:
    """Remove unreadable states and what killed processes left, and add states that the index lacks."""
    removed = existing_store(folder).gc()
    _print_numbers({"removed": removed if as_json else len(removed)}, as_json)


@app.command()
def forget(
    folder: Annotated[Path, DIR],
    source: Annotated[str, typer.Argument(help="A source, as listed by `gradmem store list`.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Remove all that comes from a source, also from the disk. Texts that other sources share stay for those."""
    store = existing_store(folder)
    check_source(store, source)
    _print_numbers({"removed": store.forget(source)}, as_json)


@app.command()
def stats(folder: Annotated[Path, DIR], as_json: Annotated[bool, JSON] = False) -> None:
    """Count states, sources, tokens, bytes, and the states of each model."""
    figures = asdict(existing_store(folder).stats())
    if not as_json:
        figures |= {f"model {name}": states for name, states in figures.pop("models").items()}
    _print_numbers(figures, as_json)


def _beginning(entry: Entry) -> str:
    text = " ".join((entry.text or "")[: 2 * SHOWN].split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _print_rows(rows: Sequence[dict[str, Any]], figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
    elif rows:
        table = Table(*(Column(_SAID.get(name, name), overflow="fold") for name in rows[0]))
        for row in rows:
            table.add_row(*(Text(visible(_in_words(value))) for value in row.values()))
        Console().print(table)
    else:
        typer.echo("The store is empty.")


def _in_words(value: str | int | None) -> str:
    """The text of a table cell; `None` is the source of texts that were written without one."""
    return "(without a source)" if value is None else f"{value:,}" if isinstance(value, int) else value


def _print_numbers(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
    else:
        typer.echo("\n".join(f"{_SAID.get(name, name)}: {_in_words(value)}" for name, value in figures.items()))


def _print_report(store: MemoryStore, report: Report, as_json: bool) -> None:
    if as_json:
        print_json({"ok": report.ok} | asdict(report))
    else:
        typer.echo(f"Intact and listed correctly: {counted(report.states, 'state')}.")
        for key, wrong in report.damaged.items():
            places = in_words(asdict(entry) for entry in store.entries() if entry.key == key).replace("\n", "; ")
            typer.echo(f"{key}{f' ({places})' if places else ''} is damaged: {visible(wrong)}")
        if report.damaged:
            typer.echo("`gradmem write` writes texts of damaged states again; `gradmem store gc` removes the states.")
        for key in report.unlisted:
            typer.echo(f"{key} is intact, but not in the index as it is. `gradmem store gc` corrects the index.")
        for name in report.leftovers:
            typer.echo(f"{visible(name)} does not belong to a state.")
    if not report.ok:
        raise typer.Exit(1)
