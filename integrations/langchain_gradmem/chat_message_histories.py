"""Chat histories whose old turns are memory states."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import uuid
from collections.abc import Sequence
from typing import Any, Self

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage, message_to_dict, messages_from_dict

from gradmem_adapter.utils.files import opening, replacing
from gradmem_adapter.utils.temporary import locked

from .stores import MemoryStateStore
from .turns import TurnMemory


class GradMemChatMessageHistory(BaseChatMessageHistory):
    """A history whose `messages` are system messages, a message with the memory of old turns, and recent ones as text.

    The messages themselves are kept in another history, complete and as text, so that nothing is lost if a write fails,
    a state is damaged or the adapter changes: what is missing is written again, with a warning. To outlive its process,
    it needs a persistent `history` and a store of states that outlives it as well.

    Args:
        memory (`TurnMemory`): determines which turns stay text, and writes the others.
        history (`BaseChatMessageHistory`, *optional*): where the messages are; None: in this process.
        session_id (`str`, *optional*): the conversation's name, unique in the memory's store. Conversations with the
            same turns share states; the name tells which states nobody else needs. None: a `StoredChatMessageHistory`
            and messages in this process have one of their own; for any other `history`, only `MemoryStateStore.gc`
            deletes states.

    Raises:
        TypeError: the session id is not a text.
    """

    def __init__(
        self, memory: TurnMemory, history: BaseChatMessageHistory | None = None, session_id: str | None = None
    ) -> None:
        self.memory = memory
        self.history = _InProcess() if history is None else history
        self.session_id = session_id if session_id is None else _checked(session_id)
        self._source = self._name()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[TurnMemory, BaseChatMessageHistory, str | None]]:
        return type(self), (self.memory, self.history, self.session_id)  # without the lock: each copy gets its own

    def _name(self) -> str | None:
        """The source that the states of this conversation have in the store."""
        if self.session_id is not None:
            return f"session {self.session_id}"
        if isinstance(self.history, StoredChatMessageHistory):
            here = self.history.path.is_relative_to(self.memory.store.store.path)
            return f"session {self.history.session_id if here else self.history.path.absolute()}"
        return f"session {self.history.name}" if isinstance(self.history, _InProcess) else None

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The messages for a prompt."""
        messages = list(self.history.messages)
        shown = self.memory.shown(messages, self._source)
        self._forget_what_changed(messages)
        return shown

    @property
    def archive(self) -> list[BaseMessage]:
        """The old turns in their original form."""
        messages = self.history.messages
        return messages[: self.memory.cut(messages)]

    @property
    def references(self) -> list[str]:
        """The references of the old turns' states, for `MemoryStateStore.gc`."""
        return self.memory.references(self.history.messages)

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add messages, and write old turns if there are too many.

        Args:
            messages (`Sequence[BaseMessage]`): the messages since the last call.
        """
        with self._lock:
            before = list(self.history.messages)  # a copy: some histories return their own list, which grows
            self.history.add_messages(messages)
            now = list(self.history.messages)
            self.memory.shown(now, self._source)  # writes now, so that reading need not write
            self._forget_what_changed(before, now)

    def clear(self) -> None:
        """Forget everything, including the states, except those that another conversation shares."""
        with self._lock:
            self.history.clear()
            self.memory.forget(self._source)  # last: a thread that is writing notices a cleared history

    def _forget_what_changed(self, *seen: list[BaseMessage]) -> None:
        """Delete states that were needed for the messages `seen` earlier but are not needed for the present ones.

        While states were being written here, another object or process may have cleared the conversation and deleted
        its states.
        """
        now = self.history.messages
        changed = [messages for messages in seen if messages != now]
        if changed:
            needed = self.memory.references(now, cuts=2)
            found = [reference for messages in changed for reference in self.memory.references(messages, cuts=2)]
            self.memory.forget(self._source, [reference for reference in found if reference not in needed])


class StoredChatMessageHistory(BaseChatMessageHistory):
    """A session's messages as JSON, in the directory of the memory states.

    Threads and processes may share a session.

    Args:
        store (`MemoryStateStore`): a store over a directory that outlives the process.
        session_id (`str`): any text, which the store lists its states under.

    Raises:
        TypeError: the session id is not a text.
    """

    def __init__(self, store: MemoryStateStore, session_id: str) -> None:
        self.session_id = _checked(session_id)
        name = hashlib.sha256(session_id.encode()).hexdigest()
        self.path = store.store.path / "sessions" / f"{name}.json"

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The session's messages; raises `ValueError` if their file is damaged."""
        with opening(f"The session in {str(self.path)!r} (clear() forgets it)"):
            try:
                text = self.path.read_text("utf-8")
            except FileNotFoundError:
                return []
            return messages_from_dict(json.loads(text))

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add messages.

        Args:
            messages (`Sequence[BaseMessage]`): the messages since the last call.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent), replacing(self.path) as temporary:  # the whole file is rewritten
            everything = [message_to_dict(message) for message in [*self.messages, *messages]]
            temporary.write_text(json.dumps(everything), "utf-8")

    def clear(self) -> None:
        """Delete the session."""
        if self.path.parent.exists():
            with locked(self.path.parent):  # otherwise add_messages elsewhere could restore what it has read
                self.path.unlink(missing_ok=True)


def _checked(session_id: object) -> str:
    if not isinstance(session_id, str):
        raise TypeError(f"session_id must be a string, got {type(session_id).__name__}. Pass str({session_id!r}).")
    return session_id


class _InProcess(BaseChatMessageHistory):
    """Messages in this process. LangChain's own class is deprecated and has no unique name."""

    def __init__(self) -> None:
        self._kept: list[BaseMessage] = []
        self.name = uuid.uuid4().hex

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)()  # with a new name: it is another conversation
        copied._kept = copy.deepcopy(self._kept, memo)
        return copied

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        return list(self._kept)

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        self._kept.extend(messages)  # one atomic call: several histories, in other threads, may share this one

    def clear(self) -> None:
        self._kept.clear()
