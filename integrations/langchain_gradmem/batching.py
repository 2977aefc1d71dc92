"""Chat models whose `batch` is one batch, where LangChain would answer its inputs one by one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import run_in_executor

_answers: ContextVar[dict[str, list[ChatResult]] | None] = ContextVar("gradmem_answers", default=None)
"""What `batch` has computed for the calls that it is about to make, by their messages."""


class BatchingChatModel(BaseChatModel):
    """A chat model that answers all inputs of `batch` at once, while callbacks and caches see a call each."""

    @abstractmethod
    def _generate_all(
        self, conversations: Sequence[Sequence[BaseMessage]], stop: list[str] | None = None, **kwargs: Any
    ) -> list[ChatResult]:
        """Answers to several conversations, in their order."""

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        waiting = (_answers.get() or {}).get(self._key(messages))
        if waiting:
            return waiting.pop()
        return self._generate_all([messages], stop, **kwargs)[0]

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answers to several inputs, computed as one batch.

        Args:
            inputs (`list[LanguageModelInput]`): texts, messages or prompt values.
            config (`RunnableConfig` or a list of them, *optional*): callbacks, tags, ... of the calls.
            return_exceptions (`bool`, *optional*, defaults to `False`): return what goes wrong in the place of an
                answer. Where the batch as a whole fails, inputs are then answered one by one.
            kwargs: what `invoke` takes, the same for all inputs.

        Returns:
            `list[AIMessage]`: in the order of the inputs.
        """
        token = _answers.set(self._answer_ahead(inputs, return_exceptions, kwargs))
        try:
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            _answers.reset(token)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """As `batch`, without blocking the event loop."""
        token = _answers.set(await run_in_executor(None, self._answer_ahead, inputs, return_exceptions, kwargs))
        try:
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            _answers.reset(token)

    def _answer_ahead(
        self, inputs: list[LanguageModelInput], return_exceptions: bool, kwargs: dict[str, Any]
    ) -> dict[str, list[ChatResult]]:
        """The answers to all inputs, by their messages."""
        conversations = [self._convert_input(value).to_messages() for value in inputs]
        try:
            results = self._generate_all(conversations, **kwargs)
        except Exception:
            if return_exceptions:
                return {}  # one by one then, so that each has its own error or answer
            raise
        answers: dict[str, list[ChatResult]] = {}
        for messages, result in zip(reversed(conversations), reversed(results), strict=True):
            answers.setdefault(self._key(messages), []).append(result)
        return answers

    def _key(self, messages: Sequence[BaseMessage]) -> str:
        """What tells this model's conversations apart."""
        parts = [(type(m).__name__, m.content, m.additional_kwargs, getattr(m, "tool_calls", None)) for m in messages]
        return repr((id(self), parts))
