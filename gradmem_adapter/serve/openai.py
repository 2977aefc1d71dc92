"""OpenAI's API: models, chat and completions, with `memory` in the body."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse

from gradmem_adapter.answering.stopping import Answer
from gradmem_adapter.prompts import Prompt
from gradmem_adapter.serve.errors import ApiError, api_error
from gradmem_adapter.serve.memories import places_of
from gradmem_adapter.serve.reads import Asked, Reads, unless_gone
from gradmem_adapter.serve.schemas import ChatRequest, CompletionRequest
from gradmem_adapter.utils.wording import counted


def tenant_of(request: Request) -> str:
    """The tenant of a request, set by `Gate`."""
    return str(request.state.tenant)


Tenant = Annotated[str, Depends(tenant_of)]


class _Form(NamedTuple):
    """The format of the answers to one request.

    Args:
        chat (`bool`): chat completions, or else completions.
        model (`str`): the model's name.
        id (`str`): the answer's id.
        created (`int`): when it was created, in seconds since 1970.
    """

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def of(cls, chat: bool, model: str) -> _Form:
        return cls(chat, model, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        own = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return own | {"choices": choices} | more

    def choice(self, index: int, text: str, ended: Answer | None, *, chunk: bool = False) -> dict[str, Any]:
        reason = None if ended is None else "stop" if ended.stopped else "length"
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"delta": {"content": text}} if chunk else {"message": {"role": "assistant", "content": text}}
        return {"index": index, "logprobs": None, "finish_reason": reason} | said


def _usage(asked: list[Asked], answers: list[Answer]) -> dict[str, Any]:
    prompt, new = sum(one.prompt_tokens for one in asked), sum(len(one.tokens) for one in answers)
    vectors = sum(one.vectors for one in asked)
    saved = sum(one.context_tokens for one in asked) - vectors
    details = {"cached_tokens": 0, "memory_vectors": vectors, "memory_saved": saved}
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": details}


def openai_routes(reads: Reads, model: str) -> APIRouter:
    """The routes of OpenAI's API."""
    router, card = APIRouter(prefix="/v1"), _card(reads, model)

    def check_model(name: str) -> None:
        if name != model:
            raise ApiError(
                404, f"This server has no model {name[:80]!r}, only {model!r}.", "model_not_found", param="model"
            )

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request, tenant: Tenant) -> Response:
        messages = [message.as_template_has_it() for message in body.messages]
        query = next(one["content"] for one in reversed(messages) if one["role"] == "user")
        check_model(body.model)
        return await _respond(reads, model, body, request, tenant, [(messages, query)])

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request, tenant: Tenant) -> Response:
        check_model(body.model)
        most = min(reads.limits.prompts, reads.limits.reads)
        if len(body.prompt) > (1 if body.stream else most):
            told = f"A request may have at most {counted(most, 'prompt')}, and only one if its answer is streamed."
            raise ApiError(400, told, param="prompt")
        return await _respond(reads, model, body, request, tenant, [(prompt, prompt) for prompt in body.prompt])

    return router


def _card(reads: Reads, model: str) -> dict[str, Any]:
    """The model's entry in the list of models."""
    config = reads.pipeline.model.active_peft_config
    return {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "gradmem",
        "memory": {
            "vectors": config.num_memory_tokens,
            "write_steps": config.write_steps,
            "trained_length": config.trained_length,
            "refusal": config.refusal,
            "dtype": str(reads.pipeline.model.dtype).removeprefix("torch."),
        },
    }


async def _respond(
    reads: Reads,
    model: str,
    body: ChatRequest | CompletionRequest,
    request: Request,
    tenant: str,
    prompts: Sequence[tuple[Prompt, str]],
) -> Response:
    """The answers to prompts, each with the question in it, as a stream or at once."""

    async def ask() -> list[Asked]:
        return [await reads.ask(tenant, body, prompt, query) for prompt, query in prompts]

    with reads.room(len(prompts)):
        asked = await unless_gone(request, ask())
        begun = reads.pieces(asked[0]) if body.stream else reads.answers(asked)
    form = _Form.of(isinstance(body, ChatRequest), model)
    support = _support(asked[0]) if isinstance(body, ChatRequest) and body.support else {}
    if isinstance(begun, AsyncGenerator):
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(form, asked[0], begun, usage, support)
        return EventSourceResponse(
            events, sep="\n", shutdown_event=anyio.Event(), shutdown_grace_period=reads.limits.grace
        )
    answers = await unless_gone(request, begun)
    choices = [
        form.choice(i, answer.text, answer) | {"memory": list(places_of(one.found))}
        for i, (one, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    memory = [place for choice in choices for place in choice["memory"]]
    return JSONResponse(form.body(choices, usage=_usage(asked, answers), memory=memory, **support))


def _support(asked: Asked) -> dict[str, Any]:
    return {"support": None if asked.found is None else asked.found.support}


async def _events(
    form: _Form, asked: Asked, pieces: AsyncIterator[str | Answer], with_usage: bool, support: dict[str, Any]
) -> AsyncIterator[str]:
    """The events of a streamed answer. An error on the way is an event, too."""
    chunk = partial(form.body, chunk=True)
    try:
        first = form.choice(0, "", None, chunk=True)
        if form.chat:
            first["delta"]["role"] = "assistant"
        yield json.dumps(chunk([first], memory=list(places_of(asked.found)), **support))
        async for piece in pieces:
            if isinstance(piece, str):
                yield json.dumps(chunk([form.choice(0, piece, None, chunk=True)]))
                continue
            yield json.dumps(chunk([form.choice(0, "", piece, chunk=True)]))
            if with_usage:
                yield json.dumps(chunk([], usage=_usage([asked], [piece])))
    except Exception as error:
        yield json.dumps(api_error(error).body)
    finally:
        asked.call.cancel()
    yield "[DONE]"
