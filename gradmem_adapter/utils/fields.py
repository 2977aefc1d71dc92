"""The fields of a run's configuration: read from YAML and settings, and kept in the directory of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .files import read_text, replacing


def read_fields(path: Path | None, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a YAML file, some of them set anew.

    A file with `base: NAME` has the fields of that file beside it, but for those that it names itself (`merged`).

    Args:
        path (`Path`, *optional*): a file with a mapping of fields.
        settings (`Sequence[str]`, *optional*): "field=value" or "outer.inner=value", where inner may be the number of
            an entry in a list; values are YAML.

    Raises:
        ValueError: the file or a setting cannot be read; the message names it.
    """
    fields = {} if path is None else from_yaml(read_text(path), str(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a mapping of fields, got {type(fields).__name__}.")
    if path is not None and (base := fields.pop("base", None)) is not None:
        fields = merged(read_fields(path.parent / str(base)), fields)
    for setting in settings:
        _set(fields, setting)
    return fields


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults with the given fields in their place, field by field in nested mappings too.

    Args:
        defaults (`Mapping[str, Any]`): fields where none are given.
        given (`Mapping[str, Any]`): fields that win; one that is no mapping replaces the default whole.
    """
    result = dict(defaults)
    for name, value in given.items():
        there = result.get(name)
        result[name] = merged(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return result


def from_yaml(text: str, name: str) -> Any:
    """What a text in YAML holds; `ValueError` names the text where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from error


def _set(fields: dict[str, Any], setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or not name:
        raise ValueError(f"A setting is written field=value or outer.inner=value, got {setting!r}.")
    *outer, last = name.split(".")
    place: Any = fields
    for key in outer:
        place = place[int(key)] if isinstance(place, list) and key.isdigit() else place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise ValueError(f"{setting!r}: {key!r} has no fields of its own.")
    if not isinstance(place, dict):
        raise ValueError(f"{setting!r}: {outer[-1]!r} is a list; say which of its entries, as in {outer[-1]}.0.{last}.")
    place[last] = from_yaml(value, f"The value of {setting!r}")


def claim_directory(file: Path, fields: Mapping[str, Any]) -> None:
    """Keep the fields of a run in a file of its directory, which no other run may go on in.

    Args:
        file (`Path`): a JSON file in the directory of the run, which is made.
        fields (`Mapping[str, Any]`): of the run, as JSON can hold them.

    Raises:
        ValueError: a run with other fields is there; the message names those that differ.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or list(file.parent.iterdir()) == [file]:  # nothing has been trained there
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(fields, indent=1), encoding="utf-8")
        return
    wanted, there = json.loads(json.dumps(fields)), json.loads(file.read_text(encoding="utf-8"))
    names = sorted(name for name in wanted | there if wanted.get(name) != there.get(name))
    if names:
        raise ValueError(
            f"{file.parent} holds a run by another configuration: {', '.join(names)} "
            f"differ{'s' if len(names) == 1 else ''}. Give --output another directory, or delete that one; its "
            f"configuration is in {file}."
        )
