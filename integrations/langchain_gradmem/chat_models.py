"""A chat model that answers from memory states."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, model_validator

from gradmem_adapter import GradMemPipeline, MemoryState

from .batching import BatchingChatModel
from .messages import as_chunk, parse_tool_calls, require_tools
from .requests import Request, request_of
from .stopping import NewTokens, cut_at_stop, pieces_until_stop
from .stores import MemoryStateStore

_OPTIONS = ("max_tokens", "temperature", "top_p", "seed")
_HOSTED = frozenset({"api_key", "max_retries", "timeout"})
"""Standard options of LangChain's chat models that a local model has no use for, and passes over."""
_seeding = threading.Lock()


class ChatGradMem(BatchingChatModel):
    """A local model with GradMem memory as a LangChain chat model.

    Which memory states a call reads is said by `bind(memory=reference)` or by references attached to its messages
    (`attach`, `attach_documents`); several are read side by side. Markers in texts are never resolved; one that
    nothing carries comes with a warning. A call that reads no state is answered by the backbone alone, without the
    adapter.

    Args:
        pipeline (`GradMemPipeline`): the model and its tokenizer, which needs a chat template.
        store (`MemoryStateStore`, *optional*, defaults to a new one in memory): where the states are that references
            name.
        model_name (`str`, *optional*, defaults to `"gradmem"`): what is reported as the model.
        max_tokens (`int`, *optional*, defaults to `256`): most new tokens of an answer.
        temperature (`float`, *optional*): of sampling; None or 0: greedy.
        top_p (`float`, *optional*): nucleus of sampling; None: all tokens.
        seed (`int`, *optional*): of sampling; None: the process's own generator.
        stop (`list[str]`, *optional*): texts that end an answer and are not part of it.
        streaming (`bool`, *optional*, defaults to `False`): let `invoke` stream to its callbacks.
        max_states (`int`, *optional*, defaults to `8`): most states that one call reads. Those of the last turn come
            first, then the newest; others are left out with a warning.
    """

    pipeline: GradMemPipeline = Field(exclude=True)
    store: MemoryStateStore = Field(exclude=True, default_factory=MemoryStateStore)
    model_name: str = "gradmem"
    max_tokens: int = Field(default=256, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: list[str] | None = None
    streaming: bool = False
    max_states: int = Field(default=8, ge=1)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        known = cls.model_fields.keys() | {field.alias for field in cls.model_fields.values()} | _HOSTED
        if isinstance(values, Mapping) and (unknown := sorted(values.keys() - known)):
            raise ValueError(
                f"ChatGradMem has no option {', '.join(unknown)}; help(ChatGradMem) explains those it has."
            )
        return values

    @property
    def _llm_type(self) -> str:
        return "gradmem"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # With the fingerprint, or two adapters under one name would share entries of an LLM cache.
        own = {name: getattr(self, name) for name in ("model_name", *_OPTIONS, "stop")}
        return own | {"fingerprint": self.pipeline.model.fingerprint(), "namespace": self.store.namespace}

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any) -> Any:
        """The model with tools, where its chat template knows them.

        Args:
            tools (`Sequence`): what `convert_to_openai_tool` takes: functions, LangChain tools, pydantic classes, ...
            tool_choice (`str`, *optional*): None or `"auto"`.
            kwargs: what else the bound calls pass.

        Raises:
            NotImplementedError: it does not, or a choice of tool is asked for, which a template cannot enforce.
        """
        require_tools(self.pipeline.tokenizer)
        if tool_choice not in (None, "auto"):
            raise NotImplementedError(
                f"tool_choice={tool_choice!r} cannot be enforced: the model chooses. Leave tool_choice out."
            )
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    # ---------------------------------------------------------------- what a call asks

    def _request(self, messages: Sequence[BaseMessage], memory: Any) -> Request:
        if any(isinstance(m, ToolMessage) or getattr(m, "tool_calls", None) for m in messages):
            require_tools(self.pipeline.tokenizer)
        return request_of(messages, memory, self.pipeline, self.store, self.max_states)

    def _generation(
        self, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any], int | None]:
        """Stop texts, options of `generate`, and the seed, of a call."""
        unknown = kwargs.keys() - {*_OPTIONS, "memory", "stream", "tools"}
        if unknown:
            raise TypeError(f"ChatGradMem got unexpected arguments: {', '.join(sorted(unknown))}.")
        chosen = {name: getattr(self, name) if kwargs.get(name) is None else kwargs[name] for name in _OPTIONS}
        options: dict[str, Any] = {"max_new_tokens": chosen["max_tokens"], "do_sample": bool(chosen["temperature"])}
        if chosen["temperature"]:
            options |= {"temperature": chosen["temperature"], "top_p": chosen["top_p"] or 1.0}
        stops = [text for text in (self.stop if stop is None else stop) or [] if text]
        return stops, options, chosen["seed"]

    # ---------------------------------------------------------------- answers

    def _generate_all(
        self, conversations: Sequence[Sequence[BaseMessage]], stop: list[str] | None = None, **kwargs: Any
    ) -> list[ChatResult]:
        """Answers to several conversations: those with memories of one size go through the model as one batch."""
        stops, options, seed = self._generation(stop, kwargs)
        requests = [self._request(messages, kwargs.get("memory")) for messages in conversations]
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.memory_vectors, []).append(i)
        results: dict[int, ChatResult] = {}
        for members in groups.values():
            answers = self._answers([requests[i] for i in members], kwargs.get("tools"), stops, options, seed)
            results |= zip(members, answers, strict=True)
        return [results[i] for i in range(len(requests))]

    def _answers(
        self,
        requests: Sequence[Request],
        tools: list[Any] | None,
        stops: list[str],
        options: dict[str, Any],
        seed: int | None,
    ) -> list[ChatResult]:
        """Answers to requests with memories of one size, in one batch."""
        states = [request.memory for request in requests if request.memory is not None]
        ids, mask = self.pipeline.encode_prompts([request.chat for request in requests], tools)
        new_tokens = NewTokens(self.pipeline.tokenizer, ids.shape[1], stops)
        with _seeded(seed):
            self.pipeline.generate_ids(
                ids,
                mask,
                memory=MemoryState.stack(states) if states else None,
                stopping_criteria=[new_tokens],
                **self.pipeline.generation_options(options),
            )
        results = []
        for row, (request, prompt_tokens) in enumerate(zip(requests, mask.sum(1).tolist(), strict=True)):
            tokens, ended = self._until_end(new_tokens.rows[row])
            text, stopped = cut_at_stop(new_tokens.text(tokens), stops)
            calls: Any = {}
            if tools:
                text, found, invalid = parse_tool_calls(text)
                calls = {"tool_calls": found, "invalid_tool_calls": invalid}
            message = AIMessage(
                text,
                **calls,
                response_metadata=self._metadata(ended or stopped),
                usage_metadata=request.usage(prompt_tokens, len(tokens)),
            )
            results.append(ChatResult(generations=[ChatGeneration(message=message)]))
        return results

    def _until_end(self, tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens up to the one that ends a text, and whether there is one."""
        eos = self.pipeline.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        for i, token in enumerate(tokens):
            if token in ends:
                return tokens[: i + 1], True
        return tokens, False

    def _metadata(self, stopped: bool) -> dict[str, Any]:
        return {"model_name": self.model_name, "finish_reason": "stop" if stopped else "length"}

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if kwargs.get("tools"):  # whether a text is a call is known when it is whole
            yield as_chunk(self._generate_all([messages], stop, **kwargs)[0])
            return
        stops, options, seed = self._generation(stop, kwargs)
        request = self._request(messages, kwargs.get("memory"))
        prompt_tokens = self.pipeline.encode_prompts([request.chat])[0].shape[1]
        new_tokens = NewTokens(self.pipeline.tokenizer, prompt_tokens, stops)
        with _seeded(seed):
            pieces = self.pipeline.stream(
                request.chat, memory=request.memory, stopping_criteria=[new_tokens], **options
            )
            stopped = False
            try:
                for piece, ended in pieces_until_stop(pieces, stops):
                    stopped = stopped or ended
                    if piece:
                        chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                        if run_manager is not None:
                            run_manager.on_llm_new_token(piece, chunk=chunk)
                        yield chunk
            finally:
                pieces.close()  # ends the generation
        tokens, ended = self._until_end(new_tokens.rows[0])
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                response_metadata=self._metadata(ended or stopped),
                usage_metadata=request.usage(prompt_tokens, len(tokens)),
                chunk_position="last",
            )
        )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Sampling under a seed, one at a time: Transformers draws from the process's own generator."""
    if seed is None:
        yield
        return
    with _seeding, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
