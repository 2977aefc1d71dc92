"""Shared by the LangChain examples: their arguments, and the adapter that ships with this repository."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradmem_adapter import GradMemPipeline, load_checkpoint

TRAINED = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m-qa"


def arguments(description: str | None, **options: Any) -> argparse.Namespace:
    """The arguments of all examples, plus those of one example, given as name=default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", default=str(TRAINED), help="a directory for load_checkpoint")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def open_pipeline(checkpoint: str) -> GradMemPipeline:
    """The pipeline of a checkpoint."""
    return GradMemPipeline(*load_checkpoint(checkpoint))
