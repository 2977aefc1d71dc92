"""Answer prompts: those that arrive at the same time in one batch, until nobody waits for them any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import anyio
from fastapi import Request

from gradmem_adapter.answering.batching import Batcher, Call, Options, answer
from gradmem_adapter.answering.grammar import grammar_of
from gradmem_adapter.answering.sampling import Sampling
from gradmem_adapter.answering.stopping import Answer, settled
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.prompts import Prompt
from gradmem_adapter.serve.errors import CLIENT_IS_GONE, ApiError, api_errors
from gradmem_adapter.serve.limits import Limits
from gradmem_adapter.serve.memories import Found, Memories
from gradmem_adapter.serve.metrics import Metrics
from gradmem_adapter.serve.schemas import ChatRequest, CompletionRequest
from gradmem_adapter.utils.wording import counted

T = TypeVar("T")
_DEFAULT_NEW_TOKENS = 256


class Asked(NamedTuple):
    """A prompt that is to be answered, and what it is answered from."""

    call: Call
    found: Found | None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, plus the memory vectors before it."""
        return len(self.call.prompt) + self.vectors

    @property
    def vectors(self) -> int:
        """The number of memory vectors."""
        return 0 if self.found is None else self.found.memory.num_memory_tokens

    @property
    def context_tokens(self) -> int:
        """The number of tokens that the memory vectors stand for."""
        return 0 if self.found is None else int(self.found.memory.context_tokens.sum())


class Reads:
    """Answers prompts."""

    def __init__(self, pipeline: GradMemPipeline, memories: Memories, limits: Limits, metrics: Metrics) -> None:
        self.pipeline, self.memories, self.limits, self.metrics = pipeline, memories, limits, metrics
        self._batcher = Batcher(begins=metrics.batch.observe)
        self._calls: set[Call] = set()
        """Calls being answered or waiting. Several threads use this set without a lock, so only by single, atomic
        operations."""
        self._coming = 0
        """Prompts whose calls have not begun. Only the event loop changes this number."""
        # A prompt may read all its states to choose among them: allow about as many states at once as a batch has rows.
        self._looking = anyio.CapacityLimiter(max(1, limits.batch // limits.states))

    def __len__(self) -> int:
        """The number of prompts being answered or waiting, including those whose memory is still being looked up."""
        return len(self._calls) + self._coming

    @contextmanager
    def room(self, prompts: int) -> Iterator[None]:
        """Reserve room for prompts before any work on them. After the block, their calls count instead.

        Raises:
            ApiError: there would be more prompts than the limit.
        """
        if len(self) + prompts > self.limits.reads:
            told = f"The server is busy: {counted(len(self), 'prompt')} being answered or waiting. Try again later."
            raise ApiError(429, told, "too_many_requests", retry_after=1)
        self._coming += prompts
        try:
            yield
        finally:
            self._coming -= prompts

    async def ask(self, tenant: str, body: ChatRequest | CompletionRequest, prompt: Prompt, query: str) -> Asked:
        """Check a prompt and find the memory to answer it from. All errors of a request are raised here."""
        return await anyio.to_thread.run_sync(self._ask, tenant, body, prompt, query, limiter=self._looking)

    def _ask(self, tenant: str, body: ChatRequest | CompletionRequest, prompt: Prompt, query: str) -> Asked:
        longest = body.max_tokens or _DEFAULT_NEW_TOKENS
        wanted, support = None, False
        if isinstance(body, ChatRequest):
            support = body.support
            longest, wanted = body.max_completion_tokens or longest, _json_schema(body.response_format)
        if longest > self.limits.new_tokens:
            told = f"An answer may have at most {counted(self.limits.new_tokens, 'token')} here, got {longest:,}."
            raise ApiError(400, told, param="max_tokens")
        with api_errors():
            (ids,) = self.pipeline.encode_prompts([prompt])[0].tolist()  # first: refuses prompts that are too long
            grammar = None if wanted is None else grammar_of(self.pipeline, wanted)
            found = None
            if body.memory:
                found = self.memories.find(tenant, body.memory, prompt, query, self.limits.states, support)
            options = Options(longest, Sampling(body.temperature, body.top_p), body.stops, grammar)
            call = Call(self.pipeline, ids, None if found is None else found.memory, options, body.seed)
        if call.by_engine and (grammar is not None or body.seed is not None):
            raise ApiError(400, "The engine of this server supports neither seed nor response_format. Leave them out.")
        return Asked(call, found)

    def _submit(self, call: Call) -> None:
        self._calls.add(call)
        call.tokens.add_done_callback(lambda _: self._calls.discard(call))
        if call.by_engine:
            # A daemon thread, so that the server can stop without waiting: an engine may take long to respond.
            threading.Thread(target=answer, args=([call],), name="gradmem-engine", daemon=True).start()
        else:
            self._batcher.submit(call, self.limits.batch)

    def _begin(self, asked: list[Asked]) -> None:
        try:
            for one in asked:
                self._submit(one.call)
        except BaseException:  # for instance, no further thread can be started
            for one in asked:
                one.call.cancel()
            raise

    def answers(self, asked: list[Asked]) -> Awaitable[list[Answer]]:
        """Whole answers, begun at once. If the waiting task is cancelled, the model stops with its next token."""
        self._begin(asked)
        return self._whole(asked)

    async def _whole(self, asked: list[Asked]) -> list[Answer]:
        try:
            with api_errors():
                tokens = await asyncio.gather(*(asyncio.wrap_future(one.call.tokens) for one in asked))
        finally:
            for one in asked:
                one.call.cancel()
        return [self._answer(one, row) for one, row in zip(asked, tokens, strict=True)]

    def pieces(self, asked: Asked) -> AsyncGenerator[str | Answer, None]:
        """An answer piece by piece, begun at once, and then as a whole. `asked.call.cancel` stops the model."""
        loop = asyncio.get_running_loop()
        grown: asyncio.Queue[list[int] | None] = asyncio.Queue()

        def put(tokens: list[int] | None) -> None:
            loop.call_soon_threadsafe(grown.put_nowait, tokens)

        asked.call.progress = put
        self._begin([asked])
        asked.call.tokens.add_done_callback(lambda _: put(None))  # added last, so that a finished call no longer counts
        return self._pieces(asked, grown)

    async def _pieces(self, asked: Asked, grown: asyncio.Queue[list[int] | None]) -> AsyncGenerator[str | Answer, None]:
        call, sent = asked.call, 0
        while (tokens := await grown.get()) is not None:
            text = settled(Answer.of(self.pipeline, tokens, call.options.stops).text, call.options.stops)
            if len(text) > sent:
                yield text[sent:]
                sent = len(text)
        with api_errors():
            whole = self._answer(asked, call.tokens.result())
        if whole.text[sent:]:
            yield whole.text[sent:]
        yield whole

    def _answer(self, asked: Asked, tokens: list[int]) -> Answer:
        self.metrics.prompt_tokens.inc(asked.prompt_tokens)
        self.metrics.new_tokens.inc(len(tokens))
        return Answer.of(self.pipeline, tokens, asked.call.options.stops)

    def close(self) -> None:
        """End all answers with their next tokens."""
        for call in list(self._calls):
            call.cancel()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled if the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_IS_GONE, "The client has disconnected.")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json_schema(wanted: dict[str, Any] | None) -> dict[str, Any] | None:
    """A response format of OpenAI's API as one with a JSON schema; None: any text is allowed."""
    match (wanted or {}).get("type", "text"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
        case "json_schema":
            return wanted
        case other:
            told = f"The type of response_format must be text, json_object or json_schema, got {other!r}."
            raise ApiError(400, told, param="response_format")
