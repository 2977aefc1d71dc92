"""The fields of a run's configuration: read from YAML and settings, and kept in the directory of the run."""

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
"""Of a configuration. YAML may repeat a value by its name, and so say in ten lines what no memory holds."""
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "merge", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML does since its version 1.2 and everybody expects."""

    close = yaml.SafeLoader.dispose


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
    fields = {} if path is None else from_yaml(read_text(path, max_bytes=MAX_BYTES), str(path))
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
    """What a text in YAML holds: mappings, lists, texts, numbers, true, false and null.

    Raises:
        ValueError: it is not YAML, or holds something else or too much; the message names it.
    """
    try:
        with closing(_Loader(text)) as loader:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"{name} has lists in lists without an end.") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is not YAML that can be read: {error}") from error


def _check_nodes(root: yaml.Node) -> None:
    """Raise where there are too many values, each counted as often as it is named, or other kinds than JSON has."""
    count, waiting = 0, [root]
    while waiting:
        node = waiting.pop()
        count += 1
        place = f"line {node.start_mark.line + 1}"
        if count > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values.")
        if node.tag not in _PLAIN:
            raise ValueError(f"{place} has a {node.tag.rpartition(':')[2]}; put it in quotes if it is a text.")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                    raise ValueError(f"{place} has a field whose name is no text; put it in quotes.")
                waiting += [key, value]


def from_json(text: str, name: str) -> Any:
    """What a text in JSON holds; `ValueError` names the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def _set(fields: dict[str, Any], setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or not name:
        raise ValueError(f"A setting is written field=value or outer.inner=value, got {setting!r}.")
    *outer, last = name.split(".")
    place: Any = fields
    for key in outer:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[_entry(place, key, setting)]
        if not isinstance(place, dict | list):
            raise ValueError(f"{setting!r}: {key!r} has no fields of its own.")
    entry: Any = last if isinstance(place, dict) else _entry(place, last, setting)
    place[entry] = from_yaml(value, f"The value of {setting!r}")


def _entry(place: list[Any], key: str, setting: str) -> int:
    if not (key.isdecimal() and int(key) < len(place)):
        raise ValueError(
            f"{setting!r}: there is a list, which has no entry {key!r} but those from 0 to {len(place) - 1}."
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
    """Inside the block a directory is that of one run, whose fields a file in it keeps. No other run may go on in it.

    If the block fails before anything has been trained, the file goes, and the directory with it.

    Args:
        file (`Path`): a JSON file in the directory of the run, which is made.
        fields (`Mapping[str, Any]`): of the run, as JSON can hold them.
        processes (`PartialState`): those of the run, which share the directory.
        may_change (`Mapping[str, Collection[str]]`, *optional*): inner fields of fields that a run may go on with
            others of.

    Raises:
        BlockingIOError: another run is under way there.
        ValueError: a run with other fields is there; the message names those that differ.
    """
    with ExitStack() as held:
        with processes.main_process_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            if processes.is_main_process:
                try:
                    held.enter_context(locked(file.parent, wait=False))
                except BlockingIOError as error:
                    told = (
                        f"Another run is under way in {file.parent}. Give --output another name, or wait for its end."
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
    if not file.is_file() or list(file.parent.iterdir()) == [file]:  # nothing has been trained there
        _keep(file, fields)
        return
    wanted, there = json.loads(json.dumps(fields)), from_json(read_text(file), str(file))
    if not isinstance(there, dict):
        raise ValueError(f"{file} holds no run. Delete its directory, or give --output another one.")
    fixed = [_without(run, may_change) for run in (wanted, there)]
    names = sorted(name for name in wanted | there if fixed[0].get(name) != fixed[1].get(name))
    if names:
        raise ValueError(
            f"{file.parent} holds a run by another configuration: {', '.join(names)} "
            f"differ{'s' if len(names) == 1 else ''}. Give --output another directory, or delete that one; its "
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
