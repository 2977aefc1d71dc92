"""What a memory store knows of a state besides its vectors."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, cast

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.options import WriteOptions

_WRITING = ("start", "write_steps", "write_lr", "write_optimizer", "write_clip_norm")
"""Fields of the configuration that change how a context is written but are not part of the fingerprint."""

_SPEED = ("compile", "max_memory")
"""Options that change how fast a context is written. They change its state by rounding errors only."""

Place: TypeAlias = tuple[str | None, int | None, int | None]
"""Source, start and end."""


@dataclass(frozen=True)
class Entry:
    """A state in a memory store, and a place where its text was found.

    Args:
        key (`str`): the state's key, 32 hexadecimal digits.
        source (`str`, *optional*): where the text comes from, such as a file's name.
        start, end (`int`, *optional*): the text's place in its source, in characters.
        text (`str`, *optional*): the text that was written; None: the store does not keep it.
        metadata (`Mapping`, *optional*): anything else about the place, in JSON types.
        options (`Mapping`): how the text was written: the configuration's fields, and the write options that were
            chosen.
        tokens (`int`): the number of tokens in the text.
        fingerprint (`str`): the fingerprint of the model that wrote it.
        nbytes (`int`): the size of its file.
        written (`float`): when it was written, in seconds since 1970.

    Raises:
        TypeError, ValueError: the source is not a text, the offsets are invalid, or the metadata are not JSON types.
    """

    key: str
    source: str | None = None
    start: int | None = None
    end: int | None = None
    text: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    fingerprint: str = ""
    nbytes: int = 0
    written: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str | None):
            raise TypeError(f"The source must be a string, got {self.source!r}. Convert it with str().")
        if self.place[1:] != (None, None):
            start, end = (x if type(x) is int else -1 for x in self.place[1:])
            if not 0 <= start <= end < 2**63:
                raise ValueError(f"Offsets must be two integers with 0 <= start <= end, got {self.place[1:]}.")
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"metadata must be a mapping, got {self.metadata!r}.")
        try:
            kept = json.dumps(dict(self.metadata), allow_nan=False, ensure_ascii=False)
            f"{self.source}{kept}".encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"The source and metadata must be JSON types in valid UTF-8, and those of {self.source!r} are not: "
                f"{error}. Remove the invalid value or convert it to a valid string."
            ) from error
        object.__setattr__(self, "metadata", json.loads(kept))  # the same as when it is read back

    @property
    def place(self) -> Place:
        """Source, start and end."""
        return self.source, self.start, self.end


def places(
    count: int,
    sources: str | Sequence[str | None] | None,
    offsets: Sequence[tuple[int, int]] | None,
    metadata: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
) -> list[Entry]:
    """Entries that say where texts come from, with keys and texts still to be filled in.

    Args:
        count (`int`): the number of texts.
        sources, offsets, metadata (*optional*): as `MemoryStore.add` takes them.
        options (`Mapping`): how the texts are written.

    Raises:
        TypeError, ValueError: there are more or fewer sources, offsets or metadata than texts, or an entry is invalid.
    """
    if sources is None or isinstance(sources, str) or not hasattr(sources, "__len__"):
        sources = [cast(Any, sources)] * count
    check_kind("offsets", offsets, Sized | None, "a list of pairs, one for each text")
    check_kind("metadata", metadata, Sequence | None, "a list of mappings, one for each text")
    for name, values in {"sources": sources, "offsets": offsets, "metadata": metadata}.items():
        if values is not None and len(values) != count:
            raise ValueError(f"Got {counted(count, 'text')} but {len(values):,} {name}: pass one for each text.")
    if offsets is not None and not all(len(pair) == 2 for pair in offsets):
        raise ValueError("Offsets must be pairs (start, end): where each text begins and ends in its source.")
    return [
        Entry(
            key="",
            source=source,
            start=operator.index(offsets[i][0]) if offsets is not None else None,
            end=operator.index(offsets[i][1]) if offsets is not None else None,
            metadata=metadata[i] if metadata is not None else {},
            options=options,
        )
        for i, source in enumerate(sources)
    ]


def write_identity(config: GradMemConfig, options: WriteOptions) -> dict[str, Any]:
    """How a text is written, in JSON types: only options that differ from their defaults, so that a new option changes
    no key.

    An option that repeats the adapter's configuration counts as its default. Options that only change how fast a state
    is written are left out.

    Args:
        config (`GradMemConfig`): the adapter's configuration.
        options (`WriteOptions`): how to write.
    """
    default = WriteOptions()
    own: dict[str, Any] = {}
    if options.objective == "reconstruction":  # other objectives have their own defaults
        own = {"steps": config.write_steps, "optimizer": config.write_optimizer}
        if config.learn_write_lr == "no":
            own["lr"] = config.write_lr
    chosen = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in _SPEED}
    chosen = {name: value for name, value in chosen.items() if value not in (getattr(default, name), own.get(name))}
    identity = {name: getattr(config, name) for name in _WRITING} | chosen
    if options.objective == "self_study":  # it asks questions about the text in this format
        identity["query_format"] = config.query_format
    return dict(json.loads(json.dumps(identity, default=vars)))


def state_key(text: str, fingerprint: str, identity: Mapping[str, Any]) -> str:
    """The key of a state: the same for the same text written by the same model in the same way.

    Args:
        text (`str`): the context.
        fingerprint (`str`): the fingerprint of the model that writes it.
        identity (`Mapping`): how it is written, as from `write_identity`.

    Returns:
        `str`: 32 hexadecimal digits of a SHA-256.
    """
    whole = json.dumps([fingerprint, identity, text], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]
