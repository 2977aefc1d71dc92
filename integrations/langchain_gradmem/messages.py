"""Convert LangChain's messages for chat templates, and answers back to messages: texts, tool calls, usage.

Tool calls have the form of most open models: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UsageMetadata,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from transformers import PreTrainedTokenizerBase

from .references import references_of, without_markers

_ROLES: dict[type[BaseMessage], str] = {
    HumanMessage: "user", AIMessage: "assistant", SystemMessage: "system", ToolMessage: "tool",
}  # fmt: skip
_BESIDE_THE_TEXT = frozenset(
    {"reasoning", "reasoning_content", "redacted_thinking", "thinking", "tool_call", "tool_use", "function_call"}
)
"""Blocks to skip in another model's answer: reasoning, which is not shown again, and calls, kept in `tool_calls`."""
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", flags=re.DOTALL)


def template_entry(message: BaseMessage, references: Sequence[str]) -> dict[str, Any]:
    """A message as chat templates take it, without the markers of the references it carries.

    Raises:
        ValueError: the message is of another kind, or its content is not text.
    """
    text = _text(message)
    content = without_markers(text, references)
    # White space around markers is removed with them, so that a question looks as it did in training.
    entry: dict[str, Any] = {"role": _role(message), "content": content if content == text else content.strip()}
    if isinstance(message, AIMessage) and message.tool_calls:
        entry["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    return entry


def accepted(
    chat: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], tuple[str, bool]]
) -> list[dict[str, Any]]:
    """A chat in a form that the template accepts: as it is, with one system message at the beginning, or with none.

    Many templates allow a system message only at the beginning, some allow none, and some silently drop it. Its text is
    kept in any case: in the last form it precedes the first user message.

    Args:
        chat (`list[dict]`): messages as chat templates take them.
        render (`Callable`): renders a chat with the template, which raises for what it does not accept.

    Raises:
        ValueError: the template accepts none of these; the message is the template's.
    """
    system = [entry["content"].strip() for entry in chat if entry["role"] == "system"]
    if not any(system):
        return chat
    rest = [entry for entry in chat if entry["role"] != "system"]
    together = "\n\n".join(system)
    forms = [chat, [{"role": "system", "content": together}, *rest]]
    for i, entry in enumerate(rest):
        if entry["role"] == "user":
            forms.append([*rest[:i], entry | {"content": f"{together}\n\n{entry['content']}"}, *rest[i + 1 :]])
            break
    refused: TemplateError | None = None
    for form in forms:
        try:
            text, _ = render(form)
        except TemplateError as error:
            refused = error
        else:
            if all(part in text for part in system):
                return form
    raise ValueError(
        "The backbone's chat template does not show the text of system messages. Put it into a user message."
        + (f" The template says: {refused}" if refused else "")
    ) from refused


def count_tokens(
    messages: Sequence[BaseMessage],
    render: Callable[[list[dict[str, Any]]], tuple[str, bool]],
    count: Callable[[str], int],
) -> int:
    """The number of tokens of messages in the chat template. If it does not accept them, as with part of a conversation
    that begins with an answer, those of their texts.

    Args:
        messages (`Sequence[BaseMessage]`): with or without references, whose markers are not counted.
        render (`Callable`): renders a chat with the template.
        count (`Callable`): counts the tokens of a text.

    Raises:
        ValueError: as for `template_entry`.
    """
    chat = [template_entry(message, references_of(message)) for message in messages]
    try:
        return count(render(accepted(chat, render))[0]) if chat else 0
    except (TemplateError, ValueError):
        return sum(count(entry["content"]) for entry in chat)


def _role(message: BaseMessage) -> str:
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise ValueError(f"ChatGradMem supports human, AI, system and tool messages, got {type(message).__name__}.")


def _text(message: BaseMessage) -> str:
    read = {"text"} | (_BESIDE_THE_TEXT if isinstance(message, AIMessage) else set())
    for block in [] if isinstance(message.content, str) else message.content:
        if isinstance(block, dict) and block.get("type") not in read:
            raise ValueError(f"ChatGradMem reads only text, but a message has a block of type {block.get('type')!r}.")
    return str(message.text)


def require_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `NotImplementedError` unless the tokenizer's chat template supports tools."""
    if "tools" not in str(tokenizer.chat_template):
        raise NotImplementedError(
            "The backbone's chat template does not support tools, so the model would neither see nor call them. Use a "
            "backbone whose template does, or leave tools and tool messages out."
        )


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall], list[InvalidToolCall]]:
    """The text without its tool calls, the calls, and the invalid calls in their original form."""
    calls, invalid = [], []
    for said in _TOOL_CALL.finditer(text):
        identity = f"call_{uuid.uuid4().hex}"
        try:
            calls.append(_tool_call(json.loads(said[1]), identity))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            # With its tags: LangChain repairs the JSON of streamed calls, and `{"name"` would become a valid call.
            invalid.append(invalid_tool_call(name=None, args=said[0], id=identity, error=problem))
    return _TOOL_CALL.sub("", text).strip() if calls or invalid else text, calls, invalid


def _tool_call(said: Any, identity: str) -> ToolCall:
    name, arguments = said["name"], said.get("arguments")
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name must be a text that is not empty, got {name!r}.")
    if not isinstance(arguments, dict | None):
        raise TypeError(f"the arguments must be an object, got {arguments!r}.")
    return tool_call(name=name, args=arguments or {}, id=identity)


def usage_metadata(prompt_tokens: int, new_tokens: int, memory_vectors: int, context_tokens: int) -> UsageMetadata:
    """Token counts of a call; `input_token_details` has the number of memory vectors and how many tokens they save.

    Args:
        prompt_tokens (`int`): tokens of the prompt as text.
        new_tokens (`int`): tokens of the answer.
        memory_vectors (`int`): the vectors before the prompt, which count as input tokens; 0: no memory.
        context_tokens (`int`): tokens of the contexts that these vectors represent.
    """
    details: Any = {"memory_vectors": memory_vectors, "memory_saved": context_tokens - memory_vectors}
    return UsageMetadata(
        input_tokens=prompt_tokens + memory_vectors,
        output_tokens=new_tokens,
        total_tokens=prompt_tokens + memory_vectors + new_tokens,
        input_token_details=details,
    )


def _as_said(args: dict[str, Any] | str | None) -> str | None:
    return json.dumps(args) if isinstance(args, dict) else args


def as_chunk(result: ChatResult) -> ChatGenerationChunk:
    """An answer as the only chunk of a stream."""
    message = cast(AIMessage, result.generations[0].message)
    calls: list[ToolCall | InvalidToolCall] = [*message.tool_calls, *message.invalid_tool_calls]
    chunk = AIMessageChunk(
        content=message.content,
        tool_call_chunks=[
            tool_call_chunk(name=call["name"], args=_as_said(call["args"]), id=call["id"], index=i)
            for i, call in enumerate(calls)
        ],
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
        chunk_position="last",
    )
    chunk.invalid_tool_calls = message.invalid_tool_calls  # with their errors, which the chunk's parts lack
    return ChatGenerationChunk(message=chunk)
