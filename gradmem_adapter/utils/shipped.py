"""The trained adapters that come with the package."""

from __future__ import annotations

from pathlib import Path

QA = "smollm2-135m-qa"
"""Answers questions about texts."""
KEY_VALUES = "kv-retrieval"
"""Finds values by their keys."""


def shipped(name: str | Path) -> Path | None:
    """The directory of a shipped adapter: next to the code in the wheel, above it in the source tree.

    None if no shipped adapter has that name, or if a local directory has it, which comes first."""
    if Path(name).is_dir():
        return None
    places = [folder / name for folder in _folders()]
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


def names_shipped() -> list[str]:
    """The names of the shipped adapters."""
    return sorted({file.parent.name for folder in _folders() for file in folder.glob("*/adapter_config.json")})


def _folders() -> list[Path]:
    package = Path(__file__).parents[1]
    return [package / "checkpoints", package.parent / "checkpoints"]
