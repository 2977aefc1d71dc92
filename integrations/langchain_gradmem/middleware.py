"""Memory for agents of `langchain.agents.create_agent` (extra `langchain`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.runnables.config import run_in_executor
from typing_extensions import NotRequired

from .turns import TurnMemory


class GradMemState(AgentState):
    """What the middleware keeps in the agent's state: text, so that every checkpointer can store it."""

    gradmem_references: NotRequired[Annotated[list[str], PrivateStateAttr]]
    """Of the states that this conversation has in the store."""
    gradmem_written: NotRequired[Annotated[list[str], PrivateStateAttr]]
    """The ids of the messages that these states may hold."""


class GradMemMiddleware(AgentMiddleware):
    """Shows the model old turns as memory and recent ones as text; the agent's messages stay as they are.

    What is shown depends on the messages that are there. Where one was removed, by `RemoveMessage` or by another
    middleware, the states that held it are deleted, and what is left is written anew.

    Args:
        memory (`TurnMemory`): which turns stay text, and who writes the others. For an agent that outlives its process
            its store must, too (`MemoryStateStore(path)`).
    """

    state_schema = GradMemState

    def __init__(self, memory: TurnMemory) -> None:
        super().__init__()
        self.memory = memory

    def before_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Delete states of messages that were removed, and those that newer ones have taken the place of."""
        messages, known = state["messages"], state.get("gradmem_references", [])
        needed = self.memory.references(messages, cuts=2)
        if known == needed:
            return None
        removed = not set(state.get("gradmem_written", [])) <= {message.id for message in messages}
        self.memory.store.mdelete([reference for reference in known if removed or reference not in needed])
        written = [message.id for message in messages[: self.memory.cut(messages)]]
        return {"gradmem_references": needed, "gradmem_written": written}

    async def abefore_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """As `before_model`, without blocking the event loop."""
        return await run_in_executor(None, self.before_model, state, runtime)

    def _shown(self, request: ModelRequest) -> ModelRequest:
        messages: Any = self.memory.shown(request.messages)
        return request.override(messages=messages)

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
        """Write what has become old, and show the model memory and recent turns."""
        return handler(self._shown(request))

    async def awrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], Awaitable[ModelResponse]]
    ) -> ModelResponse:
        """As `wrap_model_call`."""
        return await handler(await run_in_executor(None, self._shown, request))
