"""A chat model that answers from memory states."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list, run_in_executor
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, model_validator

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.answering.batching import Call, Options, batcher_of
from gradmem_adapter.answering.grammar import AVAILABLE, grammar_of
from gradmem_adapter.answering.sampling import Sampling
from gradmem_adapter.answering.stopping import Answer, settled
from gradmem_adapter.config import unknown_fields

from .binding import BoundChat
from .messages import as_chunk, count_tokens, parse_tool_calls, require_tools, usage_metadata
from .options import CallOptions
from .requests import identity_of, request_of
from .stores import MemoryStateStore
from .structured import parsed, response_format

_HOSTED = frozenset({"api_key", "max_retries", "timeout"})
"""Standard options of LangChain's chat models that a local model does not need. They are accepted and ignored."""
_OF_CALLS = ("memory", "response_format", "stream", "tools")
"""Arguments of a call besides `CallOptions`."""
_CHANGES_NO_ANSWER = frozenset(
    {"cache", "callbacks", "custom_get_token_ids", "disable_streaming", "max_batch", "metadata", "name", "profile"}
    | {"rate_limiter", "streaming", "tags", "verbose"}
)
"""Fields that do not change answers. All others are part of the key of an LLM cache, so that none can be forgotten."""


class _Asked(NamedTuple):
    """A call, and what is needed to turn its answer into a message."""

    call: Call
    read: list[str]
    support: float | None
    tools: list[Any] | None

    def usage(self, new_tokens: int) -> UsageMetadata:
        """Token counts of the call."""
        memory = self.call.memory
        vectors, written = (0, 0) if memory is None else (memory.num_memory_tokens, int(memory.context_tokens.sum()))
        return usage_metadata(len(self.call.prompt), new_tokens, vectors, written)


class ChatGradMem(BaseChatModel, CallOptions):
    """A local model with GradMem memory as a LangChain chat model.

    The memory states that a call may read are named by `bind(memory=reference)` or by references attached to its
    messages (`attach`, `attach_documents`); `side_by_side` determines how several are read. Markers in texts are never
    resolved; a marker whose reference nothing carries gives a warning. A call that reads no state is answered by the
    backbone alone, without the adapter.

    Calls made at the same time, from threads, tasks or `batch`, are answered together. A call whose task is cancelled
    ends with its next token.

    Args:
        pipeline (`GradMemPipeline`): the model and its tokenizer, which needs a chat template.
        store (`MemoryStateStore`, *optional*, defaults to a temporary one): holds the states that references name.
        model_name (`str`, *optional*, defaults to `"gradmem"`): the name reported as the model.
        max_tokens (`int`, *optional*, defaults to `256`): the most new tokens in an answer.
        temperature (`float`, *optional*): sampling temperature; None or below 1e-4: greedy.
        top_p (`float`, *optional*): nucleus sampling; None: all tokens.
        seed (`int`, *optional*): sampling seed, with the same effect alone and in a batch; None: each call samples
            afresh.
        stop (`list[str]`, *optional*): texts that end an answer and are not part of it.
        streaming (`bool`, *optional*, defaults to `False`): let `invoke` stream to its callbacks.
        max_states (`int`, *optional*, defaults to `16`): the most states that one call reads. Those of the last turn
            come first, then the newest; others are left out with a warning.
        side_by_side (`bool`, *optional*): True: read all states of a call; False: only the one that holds the answer,
            as told by the adapter's refusal; None: all if the adapter was not trained to refuse, else only that one.
        max_batch (`int`, *optional*, defaults to `16`): the most calls that are answered together.
        chat_template_kwargs (`dict`, *optional*): arguments for the chat template, such as `enable_thinking`.
    """

    pipeline: GradMemPipeline = Field(exclude=True)
    store: MemoryStateStore = Field(exclude=True, default_factory=MemoryStateStore)
    model_name: str = "gradmem"
    streaming: bool = False
    max_states: int = Field(default=16, ge=1)
    side_by_side: bool | None = None
    max_batch: int = Field(default=16, ge=1)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        known = {*cls.model_fields, *(field.alias or "" for field in cls.model_fields.values()), *_HOSTED}
        if isinstance(values, Mapping) and (unknown := unknown_fields(values, known)):
            raise ValueError(f"ChatGradMem has no option {unknown} help(ChatGradMem) lists its options.")
        return values

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str = "cpu", **options: Any) -> Self:
        """A chat model from a saved adapter.

        Args:
            path (`str` or `Path`): as for `load_checkpoint`.
            device (`str`, *optional*, defaults to `"cpu"`): where to put the model.
            options: the other fields.
        """
        return cls(pipeline=GradMemPipeline(*load_checkpoint(path, device=device)), **options)

    @property
    def _llm_type(self) -> str:
        return "gradmem"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # The key of an LLM cache. Models that answer differently must not share it: two adapters may have one name.
        # LangChain adds a call's arguments, None for those left to the model: our fields are nested to avoid clashes.
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in _CHANGES_NO_ANSWER}
        own |= {"pipeline": identity_of(self.pipeline), "store": str(self.store.store.path.absolute())}
        return {"model_name": self.model_name, "fields": own}

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any) -> Any:
        """The model with tools, if its chat template supports them.

        Args:
            tools (`Sequence`): what `convert_to_openai_tool` takes: functions, LangChain tools, pydantic classes, ...
            tool_choice (`str`, *optional*): None or `"auto"`.
            kwargs: other arguments for the bound calls.

        Raises:
            NotImplementedError: the template does not support tools; or structured output or a choice of tool is
                requested, which a template cannot enforce.
        """
        if tools:
            require_tools(self.pipeline.tokenizer)
        if tool_choice not in (None, "auto"):
            raise NotImplementedError(
                f"tool_choice={tool_choice!r} cannot be enforced: the model chooses. Leave tool_choice out."
            )
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model, restricted to answers that follow a schema: nothing else can be decoded. Needs `llguidance`.

        The model is not shown the schema: the question has to say what is wanted.

        Args:
            schema (`dict` or `type`): a JSON schema, a tool's schema, a TypedDict or a pydantic class. Objects have the
                properties that it names, and others only if it says `additionalProperties`.
            method (`str`, *optional*): makes no difference: the answer is always JSON that follows the schema.
            include_raw (`bool`, *optional*, defaults to `False`): return a `dict` with the message (`raw`), its content
                (`parsed`) and what went wrong (`parsing_error`).
            strict (`bool`, *optional*): True: all properties are required.
            kwargs: other arguments for the bound calls, such as `memory`.

        Returns:
            `Runnable`: returns objects of a pydantic class, or a `dict` for any other schema. An answer that ends
            before its JSON is complete raises an `OutputParserException`.

        Raises:
            ModuleNotFoundError: `llguidance` is not installed.
            ValueError: the schema asks for something that cannot be enforced.
        """
        wanted = response_format(schema, strict)
        grammar_of(self.pipeline, wanted)  # raises now if the schema is not supported
        told = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        llm = self.bind(response_format=wanted, ls_structured_output_format=told, **kwargs)
        return parsed(llm, schema, include_raw)

    def bind(self, **kwargs: Any) -> Any:
        """The model with arguments for its calls, and for the calls of whatever is derived from it.

        Args:
            kwargs: arguments of `invoke`, such as `memory`.
        """
        return BoundChat(bound=self, kwargs=kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(structured_output=AVAILABLE)  # agents choose by this how to request a schema
        if (positions := self.pipeline.model.positions) is not None:
            profile["max_input_tokens"] = positions
        return profile

    # ---------------------------------------------------------------- what a call asks

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a text, without special ones.

        Args:
            text (`str`): any text.
        """
        return list(self.pipeline.tokenizer(text, add_special_tokens=False)["input_ids"])

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The number of tokens of messages in the chat template, not counting memory.

        Args:
            messages (`list[BaseMessage]`): any part of a conversation.
            tools (`Sequence`, *optional*): as for `bind_tools`.
        """
        schemas = [convert_to_openai_tool(tool) for tool in tools] if tools else None
        return count_tokens(messages, partial(self.pipeline.format_query, tools=schemas), self.get_num_tokens)

    def _ask(self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> _Asked:
        """Check a call and prepare it for the pipeline. All errors of a call's input are raised here."""
        if unknown := unknown_fields(kwargs, {*CallOptions.model_fields, *_OF_CALLS}):
            raise TypeError(f"A call of ChatGradMem has no argument {unknown}")
        given = {"stop": stop, **kwargs}
        chosen = CallOptions(
            **{
                name: getattr(self, name) if given.get(name) is None else given[name]
                for name in CallOptions.model_fields
            }
        )
        stops = tuple(text for text in chosen.stop or [] if text)
        if any(isinstance(m, ToolMessage) or getattr(m, "tool_calls", None) for m in messages):
            require_tools(self.pipeline.tokenizer)
        template, tools, wanted = chosen.chat_template_kwargs, kwargs.get("tools"), kwargs.get("response_format")
        if tools and wanted:
            raise NotImplementedError("A call cannot have both tools and response_format: leave one of them out.")
        request = request_of(messages, kwargs.get("memory"), self.pipeline, self.store, self.max_states, template)
        (ids,) = self.pipeline.encode_prompts([request.chat], tools, template)[0].tolist()
        how = {"tools": tools, "chat_template_kwargs": template}
        memory, read, support = request.memory(self.pipeline, self.store, self.side_by_side, **how)
        grammar = grammar_of(self.pipeline, wanted) if wanted else None
        options = Options(chosen.max_tokens, Sampling(chosen.temperature, chosen.top_p), stops, grammar)
        return _Asked(Call(self.pipeline, ids, memory, options, chosen.seed), read, support, tools)

    # ---------------------------------------------------------------- answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = self._ask(messages, stop, kwargs)
        batcher_of(self.pipeline).submit(asked.call, self.max_batch)
        try:
            return self._result(asked, asked.call.tokens.result())
        finally:
            asked.call.cancel()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = await run_in_executor(None, self._ask, messages, stop, kwargs)
        batcher_of(self.pipeline).submit(asked.call, self.max_batch)
        try:
            return self._result(asked, await asyncio.wrap_future(asked.call.tokens))
        finally:
            asked.call.cancel()

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer several inputs, as LangChain's `batch`, as many at a time as the model answers together.

        Args:
            inputs (`list[LanguageModelInput]`): texts, messages or prompt values.
            config (`RunnableConfig` or a list of them, *optional*): callbacks, tags, ... of the calls;
                `max_concurrency` bounds how many are answered at a time.
            return_exceptions (`bool`, *optional*, defaults to `False`): return errors in place of answers.
            kwargs: arguments of `invoke`, the same for all inputs.

        Returns:
            `list[AIMessage]`: in the order of the inputs.
        """
        own = RunnableConfig(max_concurrency=self.max_batch)
        configs = [cast(RunnableConfig, {**own, **given}) for given in get_config_list(config, len(inputs))]
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def _result(self, asked: _Asked, tokens: list[int]) -> ChatResult:
        """New tokens as a message."""
        tokens, text, stopped = Answer.of(self.pipeline, tokens, asked.call.options.stops)
        calls: Any = {}
        if asked.tools:
            text, found, invalid = parse_tool_calls(text)
            calls = {"tool_calls": found, "invalid_tool_calls": invalid}
        message = AIMessage(
            text,
            **calls,
            response_metadata=self._metadata(asked, stopped),
            usage_metadata=asked.usage(len(tokens)),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _metadata(self, asked: _Asked, stopped: bool) -> dict[str, Any]:
        reason, own = "stop" if stopped else "length", {"gradmem": asked.read, "gradmem_support": asked.support}
        return {"model_name": self.model_name, "finish_reason": reason} | own

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if kwargs.get("tools"):  # only a complete text tells whether it is a tool call
            yield as_chunk(self._generate(messages, stop, **kwargs))
            return
        for chunk in self._chunks(self._ask(messages, stop, kwargs)):
            if run_manager is not None and chunk.text:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if kwargs.get("tools"):
            yield as_chunk(await self._agenerate(messages, stop, **kwargs))
            return
        asked = await run_in_executor(None, self._ask, messages, stop, kwargs)
        chunks = self._chunks(asked)
        try:
            while (chunk := await run_in_executor(None, next, chunks, None)) is not None:
                if run_manager is not None and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            asked.call.cancel()  # a thread may still wait for the next piece

    def _chunks(self, asked: _Asked) -> Iterator[ChatGenerationChunk]:
        """An answer piece by piece. The last piece has the metadata of the whole answer."""
        call, stops = asked.call, asked.call.options.stops
        grown: SimpleQueue[list[int] | None] = SimpleQueue()
        call.progress = grown.put
        batcher_of(self.pipeline).submit(call, self.max_batch)
        call.tokens.add_done_callback(lambda _: grown.put(None))
        sent = 0
        try:
            while (tokens := grown.get()) is not None:
                text = settled(Answer.of(self.pipeline, tokens, stops).text, stops)
                if len(text) > sent:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=text[sent:]))
                    sent = len(text)
            tokens, text, stopped = Answer.of(self.pipeline, call.tokens.result(), stops)
        finally:
            call.cancel()
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content=text[sent:],
                response_metadata=self._metadata(asked, stopped),
                usage_metadata=asked.usage(len(tokens)),
                chunk_position="last",
            )
        )
