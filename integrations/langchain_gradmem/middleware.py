"""Memory for agents of `langchain.agents.create_agent` (extra `agents`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.runnables.config import run_in_executor
from typing_extensions import NotRequired

from .writer import TurnMemory


class GradMemState(AgentState):
    """What the middleware keeps in the agent's state: text, so that every checkpointer can store it."""

    gradmem_references: NotRequired[Annotated[list[str], PrivateStateAttr]]
    gradmem_written: NotRequired[Annotated[int, PrivateStateAttr]]


class GradMemMiddleware(AgentMiddleware):
    """Shows the model old turns as memory and recent ones as text; the agent's messages stay as they are.

    Args:
        memory (`TurnMemory`): which turns stay text, and who writes the others. For an agent that outlives its process
            its store must, too (`MemoryStateStore(LocalFileStore(...))`).
    """

    state_schema = GradMemState

    def __init__(self, memory: TurnMemory) -> None:
        super().__init__()
        self.memory = memory

    def before_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Write what has become old."""
        messages, written = state["messages"], state.get("gradmem_written", 0)
        cut = self.memory.cut(messages[written:])
        if not cut:
            return None
        references = self.memory.write(messages[: written + cut])
        return {"gradmem_references": references, "gradmem_written": written + cut}

    async def abefore_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """As `before_model`, without blocking the event loop."""
        return await run_in_executor(None, self.before_model, state, runtime)

    def _shown(self, request: ModelRequest) -> ModelRequest:
        state: Any = request.state
        references = state.get("gradmem_references")
        if not references:
            return request
        recent = request.messages[state["gradmem_written"] :]
        return request.override(messages=[self.memory.carrier(references), *recent])

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
        """Show the model memory and recent turns."""
        return handler(self._shown(request))

    async def awrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], Awaitable[ModelResponse]]
    ) -> ModelResponse:
        """As `wrap_model_call`."""
        return await handler(self._shown(request))
