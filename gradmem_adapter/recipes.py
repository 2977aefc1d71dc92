"""Recipes of training runs: YAML and `--set` to the recipe of a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from gradmem_adapter.utils.files import read_text

from .tasks.kv_recipe import KVRecipe
from .tasks.qa_recipe import QARecipe
from .tasks.rows import RowsRecipe

Recipe: TypeAlias = KVRecipe | QARecipe | RowsRecipe
TASKS: dict[str, type[Recipe]] = {"kv_retrieval": KVRecipe, "answers": QARecipe, "rows": RowsRecipe}


def load_recipe(path: Path | None, settings: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, from settings, or from a file with some of its fields set anew.

    Args:
        path: a YAML file with a mapping of fields; `task` says which.
        settings: "field=value", "outer.inner=value"; values are YAML.

    Raises:
        ValueError: the file or a setting cannot be read, or a field is unknown or wrong; the message names it.
    """
    fields: Any = {}
    if path is not None:
        try:
            fields = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path} must hold a mapping of fields, got {type(fields).__name__}.")
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"A setting is written field=value or outer.inner=value, got {setting!r}.")
        *outer, last = name.split(".")
        place = fields
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"{setting!r}: {key!r} has no fields of its own.")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"The value of {setting!r} is not YAML: {error}") from error
    task = fields.get("task")
    if task not in TASKS:
        raise ValueError(f"A recipe's task must be one of {', '.join(TASKS)}, got {task!r}.")
    return TASKS[task].of(fields)
