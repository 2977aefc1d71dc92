"""Tool calls, for models whose chat template knows tools.

A call is written as most open models write it: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall
from langchain_core.messages.tool import invalid_tool_call, tool_call
from transformers import PreTrainedTokenizerBase

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", flags=re.DOTALL)


def require_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `NotImplementedError` unless the tokenizer's chat template knows tools."""
    if "tools" not in str(tokenizer.chat_template):
        raise NotImplementedError(
            "The backbone's chat template does not know tools, so the model would neither see nor call them. Use a "
            "backbone whose template does, or leave tools and tool messages out."
        )


def calls_of(message: AIMessage) -> list[dict[str, Any]]:
    """The calls of a message as chat templates take them."""
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
        for call in message.tool_calls
    ]


def parse_calls(text: str) -> tuple[str, list[ToolCall], list[InvalidToolCall]]:
    """The text without its tool calls, the calls, and what was meant as one but is none."""
    calls, invalid = [], []
    for body in _CALL.findall(text):
        identity = f"call_{uuid.uuid4().hex}"
        try:
            content = json.loads(body)
            calls.append(tool_call(name=content["name"], args=dict(content.get("arguments") or {}), id=identity))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
            invalid.append(invalid_tool_call(name=None, args=body.strip(), id=identity, error=problem))
    return _CALL.sub("", text).strip() if calls or invalid else text, calls, invalid
