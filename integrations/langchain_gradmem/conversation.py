"""Old turns of a conversation as memory states: what history, middleware and classic memory share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from pydantic import BaseModel, ConfigDict, Field

from gradmem_adapter import GradMemModel, GradMemPipeline

from .references import attach, marker
from .store import MemoryStateStore


class TurnMemory(BaseModel):
    """Decides which turns stay text, and writes the others.

    Attributes:
        pipeline: who writes.
        store: where states are kept.
        max_turns: with more turns (human messages) than that, old ones are written.
        keep_turns: so many of the last turns stay text then.
        write_options: what `pipeline.write` takes: steps, lr, optimizer, tolerance.
        notice: what the message that carries the memory says.
    """

    pipeline: GradMemPipeline = Field(exclude=True)
    store: MemoryStateStore = Field(exclude=True, default_factory=MemoryStateStore)
    max_turns: int = Field(default=8, ge=1)
    keep_turns: int = Field(default=4, ge=1)
    write_options: dict[str, Any] = Field(default_factory=dict)
    notice: str = "The earlier turns of this conversation are in memory."

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

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

        Raises:
            ValueError: a turn that cannot be written; the message says why.
        """
        return self.store.write(self.pipeline, self.parts(messages), **self.write_options)

    def carrier(self, references: Sequence[str]) -> SystemMessage:
        """The message that stands for the turns in memory."""
        shown = " ".join(marker(reference) for reference in references)
        return attach(SystemMessage(f"{self.notice} {shown}"), references)

    def parts(self, messages: Sequence[BaseMessage]) -> list[str]:
        """The texts that old turns are written as."""
        model = cast(GradMemModel, self.pipeline.model.base_model)
        limit = None if model.positions is None else model.positions - model.prefix_length
        parts: list[str] = []
        for line in (_line(message) for message in messages if not isinstance(message, SystemMessage)):
            longer = f"{parts[-1]}\n{line}" if parts else line
            if parts and (limit is None or len(self.pipeline.tokenizer(longer)["input_ids"]) <= limit):
                parts[-1] = longer
            else:
                parts.append(line)
        return parts


def _line(message: BaseMessage) -> str:
    name = "User" if isinstance(message, HumanMessage) else "Assistant" if isinstance(message, AIMessage) else "Tool"
    return f"{name}: {message.text}"
