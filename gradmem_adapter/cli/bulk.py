"""Write any number of documents of any length into a memory store."""

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
"""Segments passed to the store in one call, which returns when the last batch is on disk."""
EVERY = 30.0
"""Seconds between two lines of progress if there is no terminal, for instance in a log."""
SHOWN = 20
"""The most refused texts to name on standard error; --json names all of them."""
Piece: TypeAlias = "tuple[str, Segment, Mapping[str, Any]]"
"""The source of a segment, the segment, and its metadata."""


def write_to_store(
    store: MemoryStore, pipeline: GradMemPipeline, inputs: Inputs, segment_tokens: int | None, **how: Any
) -> Counter[str]:
    """Write documents segment by segment. Segments stored already are not written again. Progress is shown as a bar on
    a terminal, or else as an occasional line on standard error.

    If there are several processes, each writes its share.

    Args:
        store (`MemoryStore`): the store to write to.
        pipeline (`GradMemPipeline`): what writes.
        inputs (`Inputs`): the documents. Those that cannot be written are listed there as refused.
        segment_tokens (`int`, *optional*): the most tokens in a segment; None: as for `pipeline.segments`.
        how: other arguments of `MemoryStore.add`: options, max_tokens.

    Returns:
        `Counter`: numbers of `documents`, their `segments` and `tokens`, and of segments `written` now; summed over all
        processes.

    Raises:
        ValueError: the trained length is not known, or a segment would be longer than the model takes.
        MemoryStoreError, OSError: the store cannot be read or written.
        typer.Exit: Ctrl-C, after a line that says how much is stored.
    """
    pipeline.segments("", segment_tokens)  # checks the numbers once, not for each document
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
                f"gradmem write: interrupted. Written now and stored: {stored}; the same command continues from there.",
                err=True,
            )
            raise typer.Exit(130) from None
    return together(counts, inputs)


def in_words(counts: Counter[str]) -> str:
    """What `write_to_store` has done so far, as a line of text."""
    return (
        f"documents: {counts['documents']:,}, tokens: {counts['tokens']:,}, segments: {counts['segments']:,}, "
        f"of which written now: {counts['written']:,}"
    )


def print_outcome(counts: Counter[str], inputs: Inputs, as_json: bool) -> None:
    """Print what `write_to_store` has done and left out, and exit with status 2 if documents were refused."""
    if not counts["documents"] and not inputs.refused:
        raise ValueError(f"There is no text in {', '.join(inputs.paths)}.")
    if as_json:
        numbers = {name: counts[name] for name in ("documents", "segments", "tokens", "written")}
        print_json(numbers | {"refused": inputs.refused, "passed_over": inputs.passed_over})
    else:
        typer.echo(in_words(counts))
        if inputs.passed_over:
            typer.echo(f"skipped, as empty or not text: {counted(len(inputs.passed_over), 'file')}")
    more = len(inputs.refused) - SHOWN
    named = [*inputs.refused[:SHOWN], f"{more:,} more could not be written; --json names them."]
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
    """Store some segments. If that fails, store them one by one, so that only the faulty ones are left out."""
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
