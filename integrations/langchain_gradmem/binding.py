"""A chat model with bound arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableBinding

if TYPE_CHECKING:
    from .chat_models import ChatGradMem

_INNER = ("bound", "runnable", "default")
"""What LangChain's bindings and retries, fallbacks, and configurable runnables call the runnable in them."""


def chat_of(llm: Any) -> ChatGradMem:
    """The chat model in a runnable: the runnable itself, or what `bind`, `with_retry`, `with_fallbacks`,
    `configurable_fields` and the like were called on.

    Raises:
        TypeError: there is none.
    """
    inner = llm
    while not hasattr(inner, "pipeline"):
        found = (getattr(inner, name, None) for name in _INNER)
        inner = next((runnable for runnable in found if isinstance(runnable, Runnable)), None)
        if inner is None:
            raise TypeError(
                f"Expected a ChatGradMem, bound or not, got {type(llm).__name__}. For answers that follow a schema, "
                "pass attach_documents(question, documents) to chat.with_structured_output(schema)."
            )
    return cast("ChatGradMem", inner)


class BoundChat(RunnableBinding[LanguageModelInput, AIMessage]):
    """What `ChatGradMem.bind` returns. LangChain's own binding loses the bound arguments, including memory, when one of
    these methods derives another runnable from the model."""

    def with_structured_output(self, schema: Any, **options: Any) -> Any:
        """As `ChatGradMem.with_structured_output`, keeping the bound arguments."""
        return self._chat.with_structured_output(schema, **{**self.kwargs, **options}).with_config(self.config)

    def bind_tools(self, tools: Any, **options: Any) -> Any:
        """As `ChatGradMem.bind_tools`, keeping the bound arguments."""
        return self._chat.bind_tools(tools, **{**self.kwargs, **options}).with_config(self.config)

    @property
    def _chat(self) -> Any:
        return cast(Any, self.bound)
