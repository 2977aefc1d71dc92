"""Texts into memory states: the one place that writes, for documents, chat histories and agents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from gradmem_adapter import GradMemPipeline, WriteOptions

from .references import attach, marker
from .stores import MemoryStateStore


def _as_write_options(value: Any) -> Any:
    return WriteOptions(**value) if isinstance(value, Mapping) else value


class MemoryWriter(BaseModel):
    """Who writes, how, and where the states are kept: what compressors, histories and agents have in common.

    Args:
        pipeline (`GradMemPipeline`): who writes.
        store (`MemoryStateStore`, *optional*, defaults to a new one in memory): where states are kept.
        write_options (`WriteOptions` or its fields as a `dict`, *optional*): how to write.
    """

    pipeline: GradMemPipeline = Field(exclude=True)
    store: MemoryStateStore = Field(exclude=True, default_factory=MemoryStateStore)
    write_options: Annotated[InstanceOf[WriteOptions], BeforeValidator(_as_write_options)] = WriteOptions()

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def write_texts(self, texts: str | Sequence[str]) -> list[str]:
        """The references of texts in the store; those not yet stored are written.

        Args:
            texts (`str` or `Sequence[str]`): one text, or any number, of lengths that the model takes; see `split` and
                `join`.

        Raises:
            ValueError: a text cannot be written; none is stored then.
        """
        return self.store.write(self.pipeline, texts, self.write_options)

    def split(self, text: str) -> list[str]:
        """Parts of a text that fit the model, as equal as they can be, cut between tokens."""
        longest, tokenizer = self.pipeline.max_context_tokens, self.pipeline.tokenizer
        if longest is None:
            return [text]
        limit = longest - len(tokenizer("")["input_ids"])
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        count = -(-len(offsets) // limit)
        size = -(-len(offsets) // max(1, count))
        starts = [offsets[i][0] for i in range(0, len(offsets), size)] or [0]
        return [text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]

    def join(self, lines: Iterable[str]) -> list[str]:
        """Lines in as few texts as fit the model. A text is filled line by line, and stays once the next is begun."""
        longest = self.pipeline.max_context_tokens
        texts: list[str] = []
        for line in lines:
            longer = f"{texts[-1]}\n{line}" if texts else line
            if texts and (longest is None or len(self.pipeline.tokenizer(longer)["input_ids"]) <= longest):
                texts[-1] = longer
            else:
                texts.append(line)
        return texts


class TurnMemory(MemoryWriter):
    """Decides which turns of a conversation stay text, and writes the others: for histories and agents.

    Args:
        pipeline (`GradMemPipeline`): who writes.
        store (`MemoryStateStore`, *optional*, defaults to a new one in memory): where states are kept.
        write_options (`WriteOptions` or its fields as a `dict`, *optional*): how to write.
        max_turns (`int`, *optional*, defaults to `8`): with more turns (human messages) than that, old ones are
            written.
        keep_turns (`int`, *optional*, defaults to `4`): so many of the last turns stay text then.
        notice (`str`, *optional*): what the message that carries the memory says.
    """

    max_turns: int = Field(default=8, ge=1)
    keep_turns: int = Field(default=4, ge=1)
    notice: str = "The earlier turns of this conversation are in memory."

    def model_post_init(self, context: Any, /) -> None:
        if self.keep_turns > self.max_turns:
            raise ValueError(f"keep_turns ({self.keep_turns}) may not be more than max_turns ({self.max_turns}).")

    def cut(self, messages: Sequence[BaseMessage]) -> int:
        """How many of the first messages are to be written: 0, or up to a human message."""
        turns = [i for i, message in enumerate(messages) if isinstance(message, HumanMessage)]
        return turns[-self.keep_turns] if len(turns) > self.max_turns else 0

    def write(self, messages: Sequence[BaseMessage]) -> list[str]:
        """The references of the states of old turns, in as few parts as fit the model.

        A part is filled turn by turn and never changes once the next is begun, so that it is written once.

        Args:
            messages (`Sequence[BaseMessage]`): all old turns, those that were written before too.

        Raises:
            ValueError: a turn that cannot be written; the message says why.
        """
        return self.write_texts(self.parts(messages))

    def parts(self, messages: Sequence[BaseMessage]) -> list[str]:
        """The texts that old turns are written as."""
        return self.join(_line(message) for message in messages if not isinstance(message, SystemMessage))

    def carrier(self, references: Sequence[str]) -> SystemMessage:
        """The message that stands for the turns in memory."""
        shown = " ".join(marker(reference) for reference in references)
        return attach(SystemMessage(f"{self.notice} {shown}"), references)


def _line(message: BaseMessage) -> str:
    name = "User" if isinstance(message, HumanMessage) else "Assistant" if isinstance(message, AIMessage) else "Tool"
    return f"{name}: {message.text}"
