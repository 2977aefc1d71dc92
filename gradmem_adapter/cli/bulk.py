"""Any number of documents of any length into a memory store."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gradmem_adapter.cli.inputs import Inputs
from gradmem_adapter.cli.options import print_json, visible
from gradmem_adapter.cli.processes import say_once, shared_out, together, whose
from gradmem_adapter.utils.wording import counted

if TYPE_CHECKING:
    from gradmem_adapter import GradMemPipeline, MemoryStore, Segment

AT_ONCE = 1024
"""Segments that are given to the store together; behind them the last batch is waited for until it is on the disk."""
EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal, as in a log; shorter work has none."""
SHOWN = 20
"""Texts that could not be written and are named on a terminal."""
Piece: TypeAlias = "tuple[str, Segment, Mapping[str, Any]]"
"""The source of a segment, the segment, and its metadata."""


def write_to_store(
    store: MemoryStore, pipeline: GradMemPipeline, inputs: Inputs, segment_tokens: int | None, **how: Any
) -> Counter[str]:
    """Write documents segment by segment. What is stored already is not written again; progress goes to a terminal, or
    else now and then, a line each, to standard error.

    Of several processes each writes its share.

    Args:
        store (`MemoryStore`): where to.
        pipeline (`GradMemPipeline`): who writes.
        inputs (`Inputs`): the documents. One that cannot be written is refused there, and the rest goes on.
        segment_tokens (`int`, *optional*): most tokens of a segment; None: as `pipeline.segments`.
        how: what else `MemoryStore.add` takes: options, max_tokens.

    Returns:
        `Counter`: of `documents`, their `segments` and `tokens`, and of the segments those that were `written` now; by
        all processes.

    Raises:
        ValueError: the trained length is not known, or a segment would be longer than the model takes.
        MemoryStoreError, OSError: the store cannot be read or written.
        typer.Exit: Ctrl-C; what is stored by then is said.
    """
    pipeline.segments("", segment_tokens)  # wrong numbers are no document's fault
    counts: Counter[str] = Counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, start = bar.add_task(""), time.monotonic()
        said = start

        def tell() -> None:
            nonlocal said
            bar.update(task, description=in_words(counts))
            if not console.is_terminal and (now := time.monotonic()) - said >= EVERY:
                said = now
                say_once(f"gradmem write: {in_words(counts)} ({now - start:.0f} s{whose()})", err=True)

        def written(keys: list[str]) -> None:
            counts["written"] += len(keys)
            tell()

        pieces = _pieces(pipeline, inputs, segment_tokens, counts)
        try:
            while part := list(itertools.islice(pieces, AT_ONCE)):
                _add(store, pipeline, part, inputs.refuse, how | {"done": written})
                tell()
        except KeyboardInterrupt:
            stored = counted(counts["written"], "segment")
            typer.echo(
                f"gradmem write: interrupted. Written now and stored: {stored}; the same command goes on from there.",
                err=True,
            )
            raise typer.Exit(130) from None
    return together(counts, inputs)


def in_words(counts: Counter[str]) -> str:
    """What `write_to_store` has done, so far."""
    return (
        f"documents: {counts['documents']:,}, tokens: {counts['tokens']:,}, segments: {counts['segments']:,}, "
        f"of which written now: {counts['written']:,}"
    )


def print_outcome(counts: Counter[str], inputs: Inputs, as_json: bool) -> None:
    """Say what `write_to_store` has done and left out, and end the command with status 2 if it was asked for more.

    Args:
        counts (`Counter`): what it returned.
        inputs (`Inputs`): what it was given.
        as_json (`bool`): as one object.
    """
    if not counts["documents"] and not inputs.refused:
        raise ValueError(f"There is no text in {', '.join(inputs.paths)}.")
    if as_json:
        numbers = {name: counts[name] for name in ("documents", "segments", "tokens", "written")}
        print_json(numbers | {"refused": inputs.refused, "passed_over": inputs.passed_over})
    else:
        typer.echo(in_words(counts))
        if inputs.passed_over:
            typer.echo(f"passed over, as empty or no text: {counted(len(inputs.passed_over), 'file')}")
    more = len(inputs.refused) - SHOWN
    named = [*inputs.refused[:SHOWN], f"{more:,} more are left out likewise; --json names them."]
    for line in named if more > 0 else inputs.refused:
        typer.secho(f"gradmem write: {visible(line)}", fg="red", err=True)
    if inputs.refused:
        raise typer.Exit(2)


def _pieces(
    pipeline: GradMemPipeline, inputs: Inputs, segment_tokens: int | None, counts: Counter[str]
) -> Iterator[Piece]:
    from gradmem_adapter.store.whole import of_segments

    for document in shared_out(inputs):
        try:
            segments = list(pipeline.segments(document.text, segment_tokens))
        except ValueError as error:
            inputs.refuse(error, document.source)
            continue
        metadata = of_segments(segments)
        for segment in segments:
            counts.update(segments=1, tokens=segment.tokens)
            yield document.source, segment, metadata
        counts["documents"] += 1


def _add(
    store: MemoryStore,
    pipeline: GradMemPipeline,
    part: Sequence[Piece],
    refuse: Callable[..., None],
    how: dict[str, Any],
) -> None:
    """Store some segments; where that fails, one by one, so that only what is at fault is left out."""
    from gradmem_adapter import MemoryStoreError

    sources, segments, metadata = zip(*part, strict=True)
    texts, offsets = [one.text for one in segments], [(one.start, one.end) for one in segments]
    try:
        store.add(pipeline, texts, sources=sources, offsets=offsets, metadata=metadata, **how)
    except MemoryStoreError:
        raise
    except ValueError as error:
        if len(part) > 1:
            for piece in part:
                _add(store, pipeline, [piece], refuse, how)
        else:
            refuse(error, f"{sources[0]}, characters {part[0][1].start} to {part[0][1].end}")
