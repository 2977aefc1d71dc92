"""Which turns of a conversation stay text, and what stands for the others: for histories and agents."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import Field

from .references import attach, marker, references_of, without_markers
from .writer import MemoryWriter


class TurnMemory(MemoryWriter):
    """Shows a conversation as memory of its old turns and the text of the recent ones.

    What is shown depends on the messages alone. A message that was removed or changed is therefore gone from memory at
    the next call, and a state that was lost or damaged is written again.

    Args:
        pipeline (`GradMemPipeline`): what writes.
        store (`MemoryStateStore`, *optional*, defaults to a temporary one): where states are kept.
        write_options (`WriteOptions` or its fields as a `dict`, *optional*): how to write.
        part_tokens (`int`, *optional*): the most tokens in a part; None: as for `pipeline.segments`.
        progress (`bool`, *optional*, defaults to `False`): show a progress bar of writes; None: if stderr is a
            terminal.
        max_turns (`int`, *optional*, defaults to `8`): with more turns (human messages) than this, old ones are
            written.
        keep_turns (`int`, *optional*, defaults to `4`): how many of the last turns then stay text.
        max_parts (`int`, *optional*, defaults to `8`): the most states for the old turns. Beyond that, the oldest parts
            are merged in pairs, and dropped with a warning once all are merged.
        notice (`str`, *optional*): the text of the message that carries the memory.
    """

    max_turns: int = Field(default=8, ge=1)
    keep_turns: int = Field(default=4, ge=1)
    max_parts: int = Field(default=8, ge=1)
    notice: str = "The earlier turns of this conversation are in memory."

    def model_post_init(self, context: Any, /) -> None:
        if self.keep_turns > self.max_turns:
            raise ValueError(f"keep_turns ({self.keep_turns}) must not be greater than max_turns ({self.max_turns}).")

    def shown(self, messages: Sequence[BaseMessage], source: str | None = None) -> list[BaseMessage]:
        """What a model is shown: system messages, a message with the memory of old turns, and the recent turns.

        If a write fails, all messages are shown as text, with a warning, and the next call tries again.

        Args:
            messages (`Sequence[BaseMessage]`): the whole conversation.
            source (`str`, *optional*): as for `write`.
        """
        cut = self.cut(messages)
        try:
            references = self.write(messages[:cut], source)
        except Exception as error:
            warnings.warn(
                f"Old turns could not be written into memory and stay text: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return list(messages)
        system = [message for message in messages[:cut] if isinstance(message, SystemMessage)]
        return [*system, *([self.carrier(references)] if references else []), *messages[cut:]]

    def cut(self, messages: Sequence[BaseMessage]) -> int:
        """The number of first messages that are old: 0, or up to a human message.

        Turns become old several at a time, so that not every turn needs a write: `keep_turns` to `max_turns` of them
        are recent.
        """
        return self._cuts(messages)[-1]

    def _cuts(self, messages: Sequence[BaseMessage]) -> list[int]:
        """All positions where the conversation has been cut so far, beginning with 0."""
        turns = [i for i, message in enumerate(messages) if isinstance(message, HumanMessage)]
        at_once = self.max_turns - self.keep_turns + 1
        return [0, *(turns[old] for old in range(at_once, len(turns) - self.keep_turns + 1, at_once))]

    def write(self, messages: Sequence[BaseMessage], source: str | None = None) -> list[str]:
        """Return the references of the states of old turns; those not yet stored are first written.

        Args:
            messages (`Sequence[BaseMessage]`): all old turns, including those already written.
            source (`str`, *optional*): the conversation's name, unique in this store, for `forget`. None: the states
                stay until `MemoryStateStore.gc`.

        Raises:
            ValueError: a turn that cannot be written; the message says why.
        """
        parts = self.parts(messages)
        return self.write_texts(parts, [source] * len(parts))

    def forget(self, source: str | None, references: Sequence[str] | None = None) -> None:
        """Delete a conversation's states, except those that something else in the store shares.

        Args:
            source (`str`, *optional*): what they were written with. None: nothing is deleted, as it is unknown who else
                needs them.
            references (`Sequence[str]`, *optional*): which of them to delete; None: all.
        """
        if source is not None and references != []:
            self.store.store.forget(source, references)

    def references(self, messages: Sequence[BaseMessage], cuts: int = 1) -> list[str]:
        """The references of a conversation's old turns, written or not.

        Args:
            messages (`Sequence[BaseMessage]`): the whole conversation.
            cuts (`int`, *optional*, defaults to `1`): 2: also those from before the last cut, which are kept one cut
                longer than needed because a call in progress may still read them.
        """
        texts = [part for cut in self._cuts(messages)[-cuts:] for part in self.parts(messages[:cut])]
        return list(dict.fromkeys(self.store.references(self.pipeline, texts, self.write_options)))

    def parts(self, messages: Sequence[BaseMessage]) -> list[str]:
        """The texts that old turns are written as, without system messages, which stay text."""
        parts = self.join(_line(message) for message in messages if not isinstance(message, SystemMessage))
        merged = [False] * len(parts)
        while len(parts) > self.max_parts:
            # Not the newest part: it is still growing and would have to be written again.
            pair = next((i for i in range(len(parts) - 2) if self._may_merge(parts, merged, i)), None)
            if pair is None:
                warnings.warn(
                    f"The conversation does not fit into max_parts ({self.max_parts}) states: its oldest turns are no "
                    "longer in memory. Raise max_parts, and max_states of the chat model with it.",
                    stacklevel=2,
                )
                parts, merged = parts[1:], merged[1:]
            else:
                parts[pair : pair + 2] = [f"{parts[pair]}\n{parts[pair + 1]}"]
                merged[pair : pair + 2] = [True]
        return parts

    def _may_merge(self, parts: list[str], merged: list[bool], i: int) -> bool:
        longest = self.pipeline.max_context_tokens
        if merged[i] or merged[i + 1] or longest is None:
            return not (merged[i] or merged[i + 1])
        return len(self.pipeline.tokenizer(f"{parts[i]}\n{parts[i + 1]}")["input_ids"]) <= longest

    def carrier(self, references: Sequence[str]) -> SystemMessage:
        """The message that stands for the turns in memory."""
        shown = " ".join(marker(reference) for reference in references)
        return attach(SystemMessage(f"{self.notice} {shown}"), references)


def _line(message: BaseMessage) -> str:
    """A message as a line of text, with tool calls and their results, but without documents that it carried.

    Zero bytes and lone surrogates, which tools may return from files, are replaced: they cannot be written, and would
    block all other turns.
    """
    return _said(message).replace("\0", "?").encode(errors="replace").decode()


def _said(message: BaseMessage) -> str:
    text = without_markers(str(message.text), references_of(message))
    if isinstance(message, HumanMessage):
        return f"User: {text}"
    if isinstance(message, ToolMessage):
        return f"Tool {message.name or ''}: {text}"
    calls = message.tool_calls if isinstance(message, AIMessage) else []
    called = [f"{call['name']}({json.dumps(call['args'], ensure_ascii=False)})" for call in calls]
    return f"Assistant: {' '.join(filter(None, [text, *called]))}"
