"""Running a command in several processes, started by `torchrun` or `accelerate launch`."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradmem_adapter.cli.inputs import Document, Inputs

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=30)
"""How long a process that has finished its share waits for the others."""


@contextmanager
def meet(*, cpu: bool, patience: timedelta | None = None) -> Iterator[PartialState]:
    """In the block, this process is connected to the others. Each process must call this.

    If a process left without disconnecting, a thread of Gloo might free the tensors of the last exchange while Python
    shuts down. That aborts the process, after all of its work was done. After an error nothing is disconnected: that
    could wait forever for what the others never send. A connection that the caller made is kept.

    What uses the connection, such as a Trainer, must be out of use by the end of the block.

    Args:
        cpu (`bool`): the processes compute on CPUs.
        patience (`timedelta`, *optional*): how long to wait for the others in each exchange; None: torch's default.
    """
    import torch
    from accelerate import PartialState

    def connected() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    before = connected()
    state = PartialState(cpu=cpu, timeout=patience)
    yield state
    if connected() and not before:
        gc.collect()  # Gloo's threads end when nothing refers to the connection, as a Trainer in a cycle does
        state.destroy_process_group()


def shared_out(documents: Iterable[Document]) -> Iterator[Document]:
    """This process's share of the documents: with n processes, every n-th document."""
    from accelerate import PartialState

    state = PartialState()
    return itertools.islice(documents, state.process_index, None, state.num_processes)


def together(counts: Counter[str], inputs: Inputs) -> Counter[str]:
    """Sum counts over all processes, and collect in `inputs` what any of them has left out, without duplicates."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if PartialState().num_processes == 1:
        return counts
    found = gather_object([(counts, inputs.refused, inputs.passed_over)])
    inputs.refused = list(dict.fromkeys(line for _, refused, _ in found for line in refused))
    inputs.passed_over = list(dict.fromkeys(path for _, _, passed_over in found for path in passed_over))
    return sum((part for part, _, _ in found), Counter())


def whose() -> str:
    """A note that numbers are of the first process alone; empty if there is only one process."""
    from accelerate import PartialState

    count = PartialState().num_processes
    return "" if count == 1 else f", the first of {count} processes"


def say_once(line: str, err: bool = False) -> None:
    """Print a line, in the first process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(line, err=err)


def end_of_run(model: Path | None, output: Path, then: str = "") -> None:
    """Print how a training run ended, once for all its processes.

    Args:
        model (`Path`, *optional*): the trained adapter; None: the run was interrupted.
        output (`Path`): the directory of the run.
        then (`str`, *optional*): a hint on what to do with the adapter, to which its name is appended.

    Raises:
        typer.Exit: the run was interrupted.
    """
    if model is None:
        say_once(f"Interrupted; the same command continues from {output}.")
        raise typer.Exit(130)
    say_once(f"Saved: {model}" + (f". {then} {model}" if then else ""))
