"""A chat model with bound arguments."""

from __future__ import annotations

from typing import Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableBinding


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
