"""How a command reports errors: one line, plus the traceback if --debug is given."""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from typing import Any

import pydantic
import typer
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from gradmem_adapter.cli.options import visible

DEBUG = typer.Option("--debug", help="Also show the traceback of an error. May also be given at the end.")
WRONG_INPUT = (ValueError, TypeError, OSError, ImportError, SafetensorError, StrictDataclassError)
"""What this package and its libraries raise for a wrong input or option, or a problem with the machine."""
NO_MEMORY = ("can't allocate memory", "STATUS_ALLOC_FAILED")
"""Parts of the out-of-memory errors that raise no `OutOfMemoryError`: torch on CPUs and the libraries below it."""
ADVICE = {
    errno.ENOSPC: "Make room there, or name another place",
    errno.EDQUOT: "Make room there, or name another place",
    errno.EIO: "The disk may be full or broken. Make room there, or name another place",
    errno.EROFS: "Name another place",
    errno.EACCES: "Change its permissions, or name another place",
}


class Command(TyperCommand):
    """A command that loads a model, without Transformers' progress bars for loading, which takes about a second."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging

        logging.disable_progress_bar()
        if sys.stderr.isatty():
            enable_progress_bars()  # needed for downloads, which take longer
        return super().invoke(ctx)


class Commands(TyperGroup):
    """Commands that report errors in one line: exit status 2 for wrong input, 1 for failed work and for our bugs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Also accept --debug after the command."""
        flags = [argument for argument in args if argument == "--debug"]
        return super().parse_args(ctx, flags + [argument for argument in args if argument != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and turn its exception into a line and an exit status."""
        try:
            with warnings.catch_warnings():
                self._say_warnings_plainly(ctx)
                return super().invoke(ctx)
        except (typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if hasattr(error, "exit_code"):  # from Typer: wrong usage, or a normal exit
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            status, message = _outcome(error)
            typer.secho(f"{ctx.info_name} {ctx.invoked_subcommand}: {visible(message)}", fg="red", err=True)
            raise typer.Exit(status) from error

    def _say_warnings_plainly(self, ctx: Any) -> None:
        """Show warnings as one line, like errors, and hide those that libraries address to each other's authors."""

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            line = visible(" ".join(str(message).split()))
            typer.secho(f"{ctx.info_name} {ctx.invoked_subcommand}: {line}", err=True)

        if not ctx.params["debug"]:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", module="accelerate|huggingface_hub|peft|torch|transformers")
            warnings.showwarning = show


def described(error: Exception) -> str:
    """An error's message in one line, with advice if a file cannot be opened or written."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}. {ADVICE.get(error.errno or 0, '')}".rstrip(". ") + "."
    return " ".join(str(error).split()) or type(error).__name__


def _outcome(error: Exception) -> tuple[int, str]:
    """The exit status and the line for an error."""
    from torch import OutOfMemoryError  # only after a failure: the import is slow

    from gradmem_adapter import UnknownStateError
    from gradmem_adapter.training import TrainingDiverged

    line = " ".join(str(error).split())
    if isinstance(error, TrainingDiverged):
        return 1, line
    if isinstance(error, MemoryError | OutOfMemoryError) or any(words in line for words in NO_MEMORY):
        return 2, (
            "Out of memory. Use shorter texts, gradmem write --store, which cuts long ones into segments, smaller "
            f"batches (write: --max-tokens; train: training.per_device_train_batch_size), or another --device. {line}"
        )
    if isinstance(error, pydantic.ValidationError):
        return 2, "; ".join(map(_wrong_field, error.errors())) + "."
    if isinstance(error, (*WRONG_INPUT, UnknownStateError)):
        return 2, described(error)
    return 1, (
        f"This is a bug in gradmem-adapter, not a problem with your input. {type(error).__name__}: {line}. Please "
        "report it, with the output of the same command with --debug."
    )


def _wrong_field(found: Any) -> str:
    """An error found by pydantic, as `field: what is wrong`."""
    what = found["msg"].removeprefix("Value error, ").rstrip(".")
    return ": ".join(filter(None, (".".join(map(str, found["loc"])), what)))
