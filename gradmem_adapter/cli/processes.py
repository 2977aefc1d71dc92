"""A command that several processes run together, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradmem_adapter.cli.inputs import Document, Inputs

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=30)
"""How long a process that has done its share waits for the others."""


def meet(*, cpu: bool) -> PartialState:
    """Find the other processes, each of which has to call this.

    Args:
        cpu (`bool`): they compute on CPUs.
    """
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=PATIENCE)


def shared_out(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents that this process has to do with: all processes take turns."""
    from accelerate import PartialState

    state = PartialState()
    return itertools.islice(documents, state.process_index, None, state.num_processes)


def together(counts: Counter[str], inputs: Inputs) -> Counter[str]:
    """The sums over all processes. What any of them has left out is in `inputs` then, once.

    Args:
        counts (`Counter`): what this process has done.
        inputs (`Inputs`): what it was given.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if PartialState().num_processes == 1:
        return counts
    found = gather_object([(counts, inputs.refused, inputs.passed_over)])
    inputs.refused = list(dict.fromkeys(line for _, refused, _ in found for line in refused))
    inputs.passed_over = list(dict.fromkeys(path for _, _, passed_over in found for path in passed_over))
    return sum((part for part, _, _ in found), Counter())


def whose() -> str:
    """What stands behind numbers that the first process says of its own share; nothing where it is the only one."""
    from accelerate import PartialState

    count = PartialState().num_processes
    return "" if count == 1 else f", the first of {count} processes"


def say_once(line: str, err: bool = False) -> None:
    """Print a line, in the first process alone.

    Args:
        line (`str`): what all of them would say, or the first says for all.
        err (`bool`, *optional*, defaults to `False`): on standard error.
    """
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(line, err=err)


def end_of_run(model: Path | None, output: Path, then: str = "") -> None:
    """Say how a training run ended, once for all its processes.

    Args:
        model (`Path`, *optional*): what it made; None: it was interrupted.
        output (`Path`): its directory.
        then (`str`, *optional*): what to do with the model, to the end of the line but for its name.

    Raises:
        typer.Exit: it was interrupted.
    """
    if model is None:
        say_once(f"Interrupted; the same command goes on from {output}.")
        raise typer.Exit(130)
    say_once(f"Saved: {model}" + (f". {then} {model}" if then else ""))
