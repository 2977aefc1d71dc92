"""Where the command `gradmem` starts, so that its help is there at once.

`import gradmem_adapter` adds a method to PEFT, and so imports torch, Transformers and PEFT, which takes seconds. Here
the package is put into its place without being executed; that happens when a command asks for the first of its names.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from typing import Any, cast

PACKAGE = "gradmem_adapter"


def main() -> None:
    """Run the command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning makes steps many times slower where cores are shared
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which fill a log
    if PACKAGE not in sys.modules:
        _put_in_place()
    try:
        from gradmem_adapter.cli import app

        app(prog_name="gradmem")
    except KeyboardInterrupt:  # while the command is put together; later ones end by Typer
        raise SystemExit(130) from None


def _put_in_place() -> None:
    spec = cast(ModuleSpec, find_spec(PACKAGE))
    package = sys.modules[PACKAGE] = module_from_spec(spec)

    def on_first_use(name: str) -> Any:
        del package.__dict__["__getattr__"]
        cast(Loader, spec.loader).exec_module(package)
        return getattr(package, name)

    package.__dict__["__getattr__"] = on_first_use
