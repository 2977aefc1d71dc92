"""The fields of a run's configuration: read from YAML and settings, and saved in the directory of the run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from .files import read_text, replacing
from .temporary import locked

if TYPE_CHECKING:
    from accelerate import PartialState

MAX_BYTES, MAX_VALUES = 2**18, 10_000
"""Limits of a configuration. YAML aliases can expand ten lines to more than fits into memory."""
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "merge", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does."""

    close = yaml.SafeLoader.dispose


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_fields(path: Path | None, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a YAML file, with settings applied.

    A file with `base: NAME` inherits the fields of that file in the same directory, and overrides them (`merged`).

    Args:
        path (`Path`, *optional*): a file with a mapping of fields.
        settings (`Sequence[str]`, *optional*): "field=value" or "outer.inner=value", where inner may be the index of a
            list entry; values are YAML.

    Raises:
        ValueError: the file or a setting cannot be read; the message names it.
    """
    fields = {} if path is None else from_yaml(read_text(path, max_bytes=MAX_BYTES), str(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a mapping of fields, got {type(fields).__name__}.")
    if path is not None and (base := fields.pop("base", None)) is not None:
        fields = merged(read_fields(path.parent / str(base)), fields)
    for setting in settings:
        _set(fields, setting)
    return fields


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults overridden by the given fields, recursively in nested mappings.

    Args:
        defaults (`Mapping[str, Any]`): the fields to start from.
        given (`Mapping[str, Any]`): the fields that override them; a value that is not a mapping replaces the whole
            default.
    """
    result = dict(defaults)
    for name, value in given.items():
        there = result.get(name)
        result[name] = merged(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return result


def from_yaml(text: str, name: str) -> Any:
    """Parse a text in YAML: mappings, lists, strings, numbers, true, false and null.

    Raises:
        ValueError: it is not YAML, or holds other types or too many values; the message has `name`.
    """
    try:
        with closing(_Loader(text)) as loader:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"{name} has values that are nested too deeply or contain themselves.") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as YAML: {error}") from error


def _check_nodes(root: yaml.Node) -> None:
    """Raise if there are too many values, counting aliases each time, or values of types that JSON does not have."""
    count, waiting = 0, [root]
    while waiting:
        node = waiting.pop()
        count += 1
        place = f"line {node.start_mark.line + 1}"
        if count > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values.")
        if node.tag not in _PLAIN:
            raise ValueError(f"{place} has a {node.tag.rpartition(':')[2]}; put it in quotes if it is a string.")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                    raise ValueError(f"{place} has a field whose name is not a string; put it in quotes.")
                waiting += [key, value]


def from_json(text: str, name: str) -> Any:
    """Parse a text in JSON; a `ValueError` has its name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def _set(fields: dict[str, Any], setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or not name:
        raise ValueError(f"Settings must have the form field=value or outer.inner=value, got {setting!r}.")
    *outer, last = name.split(".")
    place: Any = fields
    for key in outer:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[_entry(place, key, setting)]
        if not isinstance(place, dict | list):
            raise ValueError(f"Cannot apply {setting!r}: {key!r} is a single value and has no fields.")
    entry: Any = last if isinstance(place, dict) else _entry(place, last, setting)
    place[entry] = from_yaml(value, f"The value of {setting!r}")


def _entry(place: list[Any], key: str, setting: str) -> int:
    if not (key.isdecimal() and int(key) < len(place)):
        raise ValueError(
            f"Cannot apply {setting!r}: {key!r} is not an index of the list, which has entries 0 to {len(place) - 1}."
        )
    return int(key)


@contextmanager
def claimed(
    file: Path,
    fields: Mapping[str, Any],
    processes: PartialState,
    *,
    may_change: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Iterator[None]:
    """In the block, one run holds a directory, and a file in it records the run's fields. No other run may use it.

    If the block fails before anything has been trained, the file and the directory are removed.

    Args:
        file (`Path`): a JSON file in the directory of the run; both are created.
        fields (`Mapping[str, Any]`): the fields of the run, as JSON values.
        processes (`PartialState`): the processes of the run, which share the directory.
        may_change (`Mapping[str, Collection[str]]`, *optional*): by field, its inner fields that may differ when a run
            is continued.

    Raises:
        BlockingIOError: another run is using the directory.
        ValueError: the directory holds a run with other fields; the message names those that differ.
    """
    with ExitStack() as held:
        with processes.main_process_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            if processes.is_main_process:
                try:
                    held.enter_context(locked(file.parent, wait=False))
                except BlockingIOError as error:
                    told = (
                        f"Another run is in progress in {file.parent}. Wait for it to finish, or choose another "
                        "--output."
                    )
                    raise BlockingIOError(told) from error
            _keep_or_check(file, fields, may_change)
        try:
            yield
        except Exception:
            with suppress(OSError):
                if list(file.parent.iterdir()) == [file]:
                    file.unlink()
                    file.parent.rmdir()
            raise


def _keep_or_check(file: Path, fields: Mapping[str, Any], may_change: Mapping[str, Collection[str]]) -> None:
    if not file.is_file() or list(file.parent.iterdir()) == [file]:  # nothing has been trained here yet
        _keep(file, fields)
        return
    wanted, there = json.loads(json.dumps(fields)), from_json(read_text(file), str(file))
    if not isinstance(there, dict):
        raise ValueError(f"{file} does not describe a run. Delete its directory, or choose another --output.")
    fixed = [_without(run, may_change) for run in (wanted, there)]
    names = sorted(name for name in wanted | there if fixed[0].get(name) != fixed[1].get(name))
    if names:
        raise ValueError(
            f"{file.parent} holds a run with another configuration: {', '.join(names)} "
            f"differ{'s' if len(names) == 1 else ''}. Choose another --output, or delete that directory; its "
            f"configuration is in {file}."
        )
    if wanted != there:
        _keep(file, fields)


def _keep(file: Path, fields: Mapping[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def _without(fields: dict[str, Any], inner: Mapping[str, Collection[str]]) -> dict[str, Any]:
    return {
        name: {key: part for key, part in value.items() if key not in inner[name]}
        if name in inner and isinstance(value, dict)
        else value
        for name, value in fields.items()
    }
