"""Write texts into memory states: the only place that writes, for documents, chat histories and agents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from gradmem_adapter import GradMemPipeline, WriteOptions
from gradmem_adapter.utils.tokens import check_text

from .binding import chat_of
from .stores import MemoryStateStore

if TYPE_CHECKING:
    from .chat_models import ChatGradMem


def _as_write_options(value: Any) -> Any:
    return WriteOptions(**value) if isinstance(value, Mapping) else value


class MemoryWriter(BaseModel):
    """What writes, how, and where states are kept: shared by compressors, histories and agents.

    Args:
        pipeline (`GradMemPipeline`): what writes.
        store (`MemoryStateStore`, *optional*, defaults to a temporary one): where states are kept.
        write_options (`WriteOptions` or its fields as a `dict`, *optional*): how to write.
        part_tokens (`int`, *optional*): the most tokens in a part that a text is split into; None: as for
            `pipeline.segments`, two per memory vector, at most the adapter's trained length.
        progress (`bool`, *optional*, defaults to `False`): show a progress bar of writes; None: if stderr is a
            terminal.
    """

    pipeline: GradMemPipeline = Field(exclude=True)
    store: MemoryStateStore = Field(exclude=True, default_factory=MemoryStateStore)
    write_options: Annotated[InstanceOf[WriteOptions], BeforeValidator(_as_write_options)] = WriteOptions()
    part_tokens: int | None = Field(default=None, ge=1)
    progress: bool | None = False

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def from_chat(cls, chat: ChatGradMem, **options: Any) -> Self:
        """A writer that uses a chat model's pipeline and store.

        Args:
            chat (`ChatGradMem`): the model that is to read; it may be bound, have retries, ...
            options: the other fields.

        Raises:
            TypeError: `chat` does not hold a `ChatGradMem`.
        """
        chat = chat_of(chat)
        return cls(pipeline=chat.pipeline, store=chat.store, **options)

    def write_texts(self, texts: str | Sequence[str], sources: Sequence[str | None] | None = None) -> list[str]:
        """Return the references of texts in the store; those not yet stored are first written.

        Args:
            texts (`str` or `Sequence[str]`): one text or any number, of lengths that the model takes; see `split` and
                `join`.
            sources (`Sequence[str]`, *optional*): where each comes from, for `MemoryStore.forget` and citations.

        Raises:
            ValueError: a text cannot be written.
        """
        return self.store.write(self.pipeline, texts, self.write_options, sources=sources, progress=self.progress)

    @property
    def longest(self) -> int | None:
        """The most tokens in a part, special ones excluded; None: no limit."""
        chosen = self.part_tokens or self.pipeline.model.active_peft_config.segment_tokens
        limits = [limit for limit in (chosen, self.pipeline.max_context_tokens) if limit is not None]
        return min(limits) - len(self.pipeline.tokenizer("")["input_ids"]) if limits else None

    def split(self, text: str, name: str = "The text", overlap: int | None = None) -> list[str]:
        """Split a text into parts that memory holds well, as `pipeline.segments` cuts them.

        Args:
            text (`str`): a text of any length.
            name (`str`, *optional*, defaults to `"The text"`): its name in error messages.
            overlap (`int`, *optional*): as for `pipeline.segments`.

        Raises:
            TypeError, ValueError: it is not a text, or has half a character or a zero byte.
        """
        check_text(name, text)
        if self.longest is None:
            return [text]
        limit = self.longest + len(self.pipeline.tokenizer("")["input_ids"])
        return [segment.text for segment in self.pipeline.segments(text, limit, overlap)] or [text]

    def join(self, lines: Iterable[str]) -> list[str]:
        """Join lines into as few texts as memory holds well, filled line by line; a text is final once the next begins.

        Args:
            lines (`Iterable[str]`): the lines; one that is too long by itself is split.
        """
        limit, texts, room, lines = self.longest, list[str](), 0, list(lines)
        lengths = self._lengths(lines)
        pieces = [
            piece
            for line, length in zip(lines, lengths, strict=True)
            for piece in ([line] if limit is None or length <= limit else self.split(line, overlap=0))
        ]
        for piece, length in zip(pieces, self._lengths(pieces), strict=True):
            if texts and (limit is None or length <= room):
                texts[-1] = f"{texts[-1]}\n{piece}"
            else:
                texts.append(piece)
                room = limit or 0
            room -= length
        return texts

    def _lengths(self, lines: list[str]) -> list[int]:
        """The number of tokens in each line, including its line end."""
        if not lines:
            return []
        for number, line in enumerate(lines):
            check_text(f"Line {number} ({line[:40]!r})", line)
        rows = self.pipeline.tokenizer([f"{line}\n" for line in lines], add_special_tokens=False)["input_ids"]
        return list(map(len, rows))
