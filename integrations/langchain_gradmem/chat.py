"""A chat model that answers from memory states."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    UsageMetadata,
)
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field
from transformers import StoppingCriteria

from gradmem_adapter import GradMemPipeline, MemoryState

from .references import check_references, references_of, without_markers
from .store import MemoryStateStore
from .tools import calls_of, parse_calls, require_tools

_ROLES: dict[type[BaseMessage], str] = {
    HumanMessage: "user", AIMessage: "assistant", SystemMessage: "system", ToolMessage: "tool",
}  # fmt: skip
_OPTIONS = ("max_tokens", "temperature", "top_p", "seed")
_seeding = threading.Lock()
_answers: ContextVar[dict[str, list[ChatResult]] | None] = ContextVar("gradmem_answers", default=None)
"""What `batch` has computed for the calls that it is about to make, by their messages."""


class Request(NamedTuple):
    """What one call asks of the pipeline."""

    chat: list[dict[str, Any]]
    memory: MemoryState | None
    """[1, m * states, d], the states side by side."""
    context_tokens: int


class ChatGradMem(BaseChatModel):
    """A local model with GradMem memory as a LangChain chat model.

    Which memory states a call reads is said by `bind(memory=reference)` or by references attached to its messages
    (`attach`, `attach_documents`); several are read side by side. Markers in texts are never resolved.

    Attributes:
        pipeline: the model and its tokenizer, which needs a chat template.
        store: where the states are that references name.
        model_name: what is reported as the model.
        max_tokens: most new tokens of an answer.
        temperature: None or 0: greedy.
        top_p: nucleus of sampling.
        seed: of sampling.
        stop: texts that end an answer and are not part of it.
        max_states: most states that one call may read.
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
        if not any(isinstance(message, HumanMessage) for message in messages):
            raise ValueError("There is no human message to answer: pass at least one HumanMessage.")
        references = [] if memory is None else check_references(memory)
        chat = []
        for message in messages:
            own = references_of(message)
            references += own
            entry: dict[str, Any] = {"role": _role(message), "content": without_markers(_text(message), own)}
            calls = calls_of(message) if isinstance(message, AIMessage) else []
            if calls or isinstance(message, ToolMessage):
                require_tools(self.pipeline.tokenizer)
            chat.append(entry | ({"tool_calls": calls} if calls else {}))
        references = list(dict.fromkeys(references))
        if not references:
            return Request(chat, None, 0)
        if len(references) > self.max_states:
            raise ValueError(
                f"The call refers to {len(references)} memory states, and at most {self.max_states} are read side by "
                "side: retrieve fewer documents (k), or raise max_states."
            )
        fingerprint = self.pipeline.model.fingerprint()
        states = [self.store.get(reference, fingerprint=fingerprint) for reference in references]
        tokens = sum(int(state.context_tokens.sum()) for state in states)
        return Request(chat, MemoryState.concat(states), tokens)

    def _generation(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any], Any]:
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

    def _generate_all(
        self, conversations: Sequence[Sequence[BaseMessage]], stop: list[str] | None = None, **kwargs: Any
    ) -> list[ChatResult]:
        """Answers to several conversations: those with memories of one size go through the model as one batch."""
        stops, options, seed = self._generation(stop, kwargs)
        requests = [self._request(messages, kwargs.get("memory")) for messages in conversations]
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_width(request), []).append(i)
        results: dict[int, ChatResult] = {}
        for width, members in groups.items():
            memory = MemoryState.stack([requests[i].memory for i in members]) if width else None  # type: ignore[misc]
            ids, mask = self.pipeline.encode_prompts([requests[i].chat for i in members], kwargs.get("tools"))
            watch = _Watch(self.pipeline, ids.shape[1], stops)
            with _seeded(seed):
                self.pipeline.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    memory=memory,
                    stopping_criteria=[watch],
                    **self.pipeline.generation_options(options),
                )
            for row, (i, tokens) in enumerate(zip(members, mask.sum(1).tolist(), strict=True)):
                new, ended = self._until_end(watch.rows[row])
                text, stopped = _cut(watch.text(new), stops)
                calls: Any = {}
                if kwargs.get("tools"):
                    text, found, invalid = parse_calls(text)
                    calls = {"tool_calls": found, "invalid_tool_calls": invalid}
                message = AIMessage(
                    text,
                    **calls,
                    response_metadata=self._metadata(ended or stopped),
                    usage_metadata=_usage(tokens, len(new), requests[i]),
                )
                results[i] = ChatResult(generations=[ChatGeneration(message=message)])
        return [results[i] for i in range(len(requests))]

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
            yield _whole(self._generate_all([messages], stop, **kwargs)[0])
            return
        stops, options, seed = self._generation(stop, kwargs)
        request = self._request(messages, kwargs.get("memory"))
        prompt_tokens = self.pipeline.encode_prompts([request.chat])[0].shape[1]
        watch = _Watch(self.pipeline, prompt_tokens, stops)
        with _seeded(seed):
            pieces = self.pipeline.stream(request.chat, memory=request.memory, stopping_criteria=[watch], **options)
            stopped = False
            try:
                for piece, ended in _until_stop(pieces, stops):
                    stopped = stopped or ended
                    if piece:
                        chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                        if run_manager is not None:
                            run_manager.on_llm_new_token(piece, chunk=chunk)
                        yield chunk
            finally:
                pieces.close()  # type: ignore[attr-defined] # a generator: ends the generation
        new, ended = self._until_end(watch.rows[0])
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                response_metadata=self._metadata(ended or stopped),
                usage_metadata=_usage(prompt_tokens, len(new), request),
                chunk_position="last",
            )
        )

    # ---------------------------------------------------------------- batches

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answers to several inputs, computed as one batch; callbacks and caches see a call each."""
        token = _answers.set(self._ahead(inputs, return_exceptions, kwargs))
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
        token = _answers.set(await run_in_executor(None, self._ahead, inputs, return_exceptions, kwargs))
        try:
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            _answers.reset(token)

    def _ahead(
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


def _role(message: BaseMessage) -> str:
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise ValueError(f"ChatGradMem takes human, AI, system and tool messages, got {type(message).__name__}.")


def _whole(result: ChatResult) -> ChatGenerationChunk:
    """An answer as the one chunk of a stream."""
    message = cast(AIMessage, result.generations[0].message)
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content=message.content,
            tool_call_chunks=[
                tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=i)
                for i, call in enumerate(message.tool_calls)
            ],
            response_metadata=message.response_metadata,
            usage_metadata=message.usage_metadata,
            chunk_position="last",
        )
    )


def _text(message: BaseMessage) -> str:
    """The text of a message.

    Raises:
        ValueError: it has content of another kind.
    """
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block["text"]))
        else:
            raise ValueError(f"ChatGradMem reads text alone, and a message has a block of type {block.get('type')!r}.")
    return "".join(texts)


def _width(request: Request) -> int:
    return 0 if request.memory is None else request.memory.num_memory_tokens


def _usage(prompt: int, new: int, request: Request) -> UsageMetadata:
    """Tokens of a call; `input_token_details` has the memory's vectors and how many tokens they save."""
    vectors = _width(request)
    details: Any = {"memory_vectors": vectors, "memory_saved": request.context_tokens - vectors} if vectors else {}
    return UsageMetadata(
        input_tokens=prompt + vectors,
        output_tokens=new,
        total_tokens=prompt + vectors + new,
        input_token_details=details,
    )


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop, and whether there was one."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Pieces up to a stop, and whether it came. What could be the beginning of a stop is held back until it is not."""
    text, sent = "", 0
    for piece in pieces:
        text += piece
        whole, stopped = _cut(text, stops)
        if stopped:
            yield whole[sent:], True
            return
        held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        safe = max(sent, len(text) - held)
        yield text[sent:safe], False
        sent = safe
    yield text[sent:], False


class _Watch(StoppingCriteria):
    """Keeps each row's new tokens, and ends a row that has a stop in its text, however its tokens fall."""

    def __init__(self, pipeline: GradMemPipeline, prompt: int, stops: Sequence[str]) -> None:
        self.tokenizer, self.prompt, self.stops = pipeline.tokenizer, prompt, stops
        self.rows: dict[int, list[int]] = {}
        self.stopped: set[int] = set()

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        for i, row in enumerate(input_ids[:, self.prompt :].tolist()):
            if i in self.stopped:
                continue  # what comes now is padding, while other rows go on
            self.rows[i] = row
            if self.stops and _cut(self.text(row), self.stops)[1]:
                self.stopped.add(i)
        return torch.tensor([i in self.stopped for i in range(len(input_ids))], device=input_ids.device)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Sampling under a seed, one at a time: Transformers draws from the process's own generator."""
    if seed is None:
        yield
        return
    with _seeding, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
