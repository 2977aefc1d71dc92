"""Memory for chains of `langchain_classic` (extra `langchain-classic`)."""

from __future__ import annotations

from typing import Any

try:
    from langchain_classic.base_memory import BaseMemory
except ModuleNotFoundError as error:
    told = f'{error}. Classic chains need more packages: pip install "gradmem-adapter[langchain-classic]".'
    raise ModuleNotFoundError(told, name=error.name) from error
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage
from pydantic import ConfigDict, Field, PrivateAttr

from .chat_message_histories import GradMemChatMessageHistory
from .turns import TurnMemory


class GradMemConversationMemory(BaseMemory):
    """Old turns as memory, recent ones as text, for prompts with a `MessagesPlaceholder`.

    A prompt that is one string cannot carry memory: the model would read a marker, and `ChatGradMem` warns of it.

    Args:
        memory (`TurnMemory`): determines which turns stay text, and writes the others.
        memory_key (`str`, *optional*, defaults to `"history"`): the prompt's variable.
        input_key (`str`, *optional*): the chain's input that is the question; None: the only one.
        output_key (`str`, *optional*): the chain's output that is the answer; None: the only one.
        history (`BaseChatMessageHistory`, *optional*): where the messages are; None: in this process.
        session_id (`str`, *optional*): as for `GradMemChatMessageHistory`.
    """

    memory: TurnMemory
    memory_key: str = "history"
    input_key: str | None = None
    output_key: str | None = None
    history: BaseChatMessageHistory | None = Field(default=None, exclude=True)
    session_id: str | None = None
    _history: GradMemChatMessageHistory = PrivateAttr()

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def model_post_init(self, context: Any, /) -> None:
        self._history = GradMemChatMessageHistory(self.memory, self.history, self.session_id)

    @property
    def chat_memory(self) -> GradMemChatMessageHistory:
        """The underlying history."""
        return self._history

    @property
    def memory_variables(self) -> list[str]:
        """The prompt's variable."""
        return [self.memory_key]

    def load_memory_variables(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The messages for the prompt."""
        return {self.memory_key: self._history.messages}

    def save_context(self, inputs: dict[str, Any], outputs: dict[str, str]) -> None:
        """Add a turn."""
        question = _only(inputs, self.input_key, "input_key", {self.memory_key})
        answer = _only(outputs, self.output_key, "output_key", set())
        self._history.add_messages([HumanMessage(question), AIMessage(answer)])

    def clear(self) -> None:
        """Forget everything."""
        self._history.clear()


def _only(values: dict[str, Any], key: str | None, name: str, but: set[str]) -> str:
    keys = [key] if key is not None else [k for k in values if k not in but]
    if len(keys) != 1 or keys[0] not in values:
        raise ValueError(f"Set {name} to the one of {sorted(values)} that is to be remembered.")
    return str(values[keys[0]])
