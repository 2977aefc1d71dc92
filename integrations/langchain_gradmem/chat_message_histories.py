"""A chat history whose old turns are memory states."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage

from .writer import TurnMemory


class GradMemChatMessageHistory(BaseChatMessageHistory):
    """For `RunnableWithMessageHistory`: `messages` has a message that carries the memory of old turns, then the recent
    ones as text.

    Turns are written when messages are added, not when they are read. If a write fails, `add_messages` raises, and all
    messages are in the history as text; the next call tries again.

    Args:
        memory (`TurnMemory`): which turns stay text, and who writes the others.
    """

    def __init__(self, memory: TurnMemory) -> None:
        self.memory = memory
        self.archive: list[BaseMessage] = []
        """The turns that are in memory, as they were."""
        self._recent: list[BaseMessage] = []
        self._references: list[str] = []
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """What goes into a prompt."""
        with self._lock:
            carrier = [self.memory.carrier(self._references)] if self._references else []
            return [*carrier, *self._recent]

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add messages, and write old turns where there are too many.

        Args:
            messages (`Sequence[BaseMessage]`): what came since the last call.
        """
        with self._lock:
            self._recent += messages
            cut = self.memory.cut(self._recent)
            if cut:
                archive = [*self.archive, *self._recent[:cut]]
                references = self.memory.write(archive)  # before anything is replaced: it may fail
                self.archive, self._recent, self._references = archive, self._recent[cut:], references

    def clear(self) -> None:
        """Forget everything; the states stay in the store."""
        with self._lock:
            self.archive, self._recent, self._references = [], [], []
