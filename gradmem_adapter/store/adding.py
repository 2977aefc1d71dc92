"""Add texts to a memory store, writing those that are not stored yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.store import files
from gradmem_adapter.store.claims import Claims
from gradmem_adapter.store.entry import Entry, state_key, write_identity
from gradmem_adapter.store.index import Index
from gradmem_adapter.utils.state_file import MemoryStateError
from gradmem_adapter.utils.tokens import check_text
from gradmem_adapter.utils.wording import numbered
from gradmem_adapter.write.batching import progress_bar
from gradmem_adapter.write.options import WriteOptions

AT_ONCE = 256
"""Texts per call of the pipeline: the states of all of them are in memory at once."""


def text_keys(pipeline: GradMemPipeline, texts: Sequence[str], options: WriteOptions) -> list[str]:
    """The keys that the states of texts have. The model's fingerprint is computed once for all of them.

    Args:
        pipeline (`GradMemPipeline`): what would write.
        texts (`Sequence[str]`): any number.
        options (`WriteOptions`): how to write.
    """
    for text in texts:
        check_text("The text", text)
    identity = write_identity(pipeline.model.active_peft_config, options)
    fingerprint = pipeline.model.fingerprint() if texts else ""
    return [state_key(text, fingerprint, identity) for text in texts]


def write_missing(
    index: Index,
    claims: Claims,
    pipeline: GradMemPipeline,
    texts: Sequence[str],
    entries: Sequence[Entry],
    put: Callable[[MemoryState, list[Entry]], None],
    done: Callable[[list[str]], None],
    progress: bool | None,
    **how: Any,
) -> None:
    """Write the texts whose states are not stored or are damaged, each once.

    A batch is stored in the background while the next one is written.

    Args:
        index (`Index`): the store's index.
        claims (`Claims`): the keys that threads are writing into the store.
        pipeline, texts, done, progress: as for `MemoryStore.add`.
        entries (`Sequence[Entry]`): one for each text, with its key.
        put (`Callable`): stores states with their entries.
        how: other arguments of `pipeline.write_many`.
    """
    number = {entry.key: i for i, entry in reversed(list(enumerate(entries)))}
    waiting = sorted(number, key=number.__getitem__)
    landing: list[tuple[Future[None], list[str]]] = []
    with progress_bar(len(waiting), progress) as advance, ThreadPoolExecutor(1) as behind:

        def landed(rest: int = 0) -> None:
            while len(landing) > rest:
                wait([landing[0][0]])  # Ctrl-C interrupts only the wait: the batch stays in `landing`, to be reported
                future, keys = landing.pop(0)
                future.result()
                advance(len(keys))
                done(keys)

        def land(states: MemoryState, written: list[Entry]) -> None:
            landing.append((behind.submit(put, states.cpu(), written), [entry.key for entry in written]))
            landed(rest=1)

        while waiting:
            with claims.taken(waiting) as mine:
                missing = []
                for key in mine:
                    if not _is_readable(index, key):
                        missing.append(number[key])
                advance(len(mine) - len(missing))
                try:
                    for begin in range(0, len(missing), AT_ONCE):
                        _write(pipeline, texts, entries, missing[begin : begin + AT_ONCE], land, **how)
                finally:
                    landed()
            waiting = sorted(set(waiting).difference(mine), key=number.__getitem__)  # others may have failed on theirs


def _write(
    pipeline: GradMemPipeline,
    texts: Sequence[str],
    entries: Sequence[Entry],
    numbers: Sequence[int],
    land: Callable[[MemoryState, list[Entry]], None],
    callback: Callable[[list[int], WriteProgress], None] | None = None,
    **how: Any,
) -> None:
    """Write some of the texts. Errors and warnings name a text by its number among all texts, not among these."""

    def done(rows: list[int], states: MemoryState) -> None:
        land(states, [entries[numbers[i]] for i in rows])

    def stepped(rows: list[int], progress: WriteProgress) -> None:
        if callback is not None:
            callback([numbers[i] for i in rows], progress)

    how["callback"] = callback and stepped
    with numbered(numbers):
        pipeline._write_many([texts[i] for i in numbers], progress=False, done=done, **how)


def _is_readable(index: Index, key: str) -> bool:
    try:
        files.read_file(files.state_file_of(index.states, key))
    except FileNotFoundError:
        return False
    except MemoryStateError as error:
        warnings.warn(f"The stored state {key!r} cannot be read and is written again: {error}", stacklevel=4)
        return False
    return True
