"""Memory for agents of `langchain.agents.create_agent` (extra `langchain`)."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, NotRequired

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
except ModuleNotFoundError as error:
    told = f'{error}. Agents need more packages: pip install "gradmem-adapter[langchain]".'
    raise ModuleNotFoundError(told, name=error.name) from error
from langchain_core.runnables.config import run_in_executor

from .turns import TurnMemory


class GradMemState(AgentState):
    """What the middleware keeps in the agent's state: text, so that every checkpointer can store it."""

    gradmem_references: NotRequired[Annotated[list[str], PrivateStateAttr]]
    """The references of this conversation's states in the store."""
    gradmem_written: NotRequired[Annotated[list[str], PrivateStateAttr]]
    """The ids of the messages that these states may hold."""
    gradmem_session: NotRequired[Annotated[str, PrivateStateAttr]]
    """Together with the thread's id, the conversation's name: other agents may use the same thread ids."""


class GradMemMiddleware(AgentMiddleware):
    """Shows the model old turns as memory and recent ones as text; the agent's messages are left unchanged.

    What is shown depends on the current messages. If one was removed, by `RemoveMessage` or by another middleware, the
    states that held it are deleted, except those that another conversation shares, and the rest is written again.
    Without a checkpointer the end of a conversation is unknown, and only `MemoryStateStore.gc` deletes states.

    Args:
        memory (`TurnMemory`): determines which turns stay text, and writes the others. If the agent outlives its
            process, its store must as well (`MemoryStateStore(path)`).
    """

    state_schema = GradMemState

    def __init__(self, memory: TurnMemory) -> None:
        super().__init__()
        self.memory = memory

    def before_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Delete states of messages that were removed, and states that newer ones have replaced."""
        messages, known = state["messages"], state.get("gradmem_references", [])
        needed = self.memory.references(messages, cuts=2)
        if known == needed:
            return None
        removed = not set(state.get("gradmem_written", [])) <= {message.id for message in messages}
        superseded = [reference for reference in known if removed or reference not in needed]
        self.memory.forget(_source(state, runtime), superseded)
        written = [message.id for message in messages[: self.memory.cut(messages)]]
        session = state.get("gradmem_session", uuid.uuid4().hex)
        return {"gradmem_references": needed, "gradmem_written": written, "gradmem_session": session}

    async def abefore_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """As `before_model`, without blocking the event loop."""
        return await run_in_executor(None, self.before_model, state, runtime)

    def _shown(self, request: ModelRequest) -> ModelRequest:
        messages: Any = self.memory.shown(request.messages, _source(request.state, request.runtime))
        return request.override(messages=messages)

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
        """Write turns that have become old, and show the model memory and recent turns."""
        return handler(self._shown(request))

    async def awrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], Awaitable[ModelResponse]]
    ) -> ModelResponse:
        """As `wrap_model_call`."""
        return await handler(await run_in_executor(None, self._shown, request))


def _source(state: Mapping[str, Any], runtime: Any) -> str | None:
    """The source that a conversation's states have in the store; None: there is no checkpointer, or no state yet."""
    info = getattr(runtime, "execution_info", None)
    session, thread = state.get("gradmem_session"), info and info.thread_id
    return None if session is None or thread is None else f"agent {session}, thread {thread}"
