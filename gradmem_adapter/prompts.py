"""Prompts, as a text or as chat messages, and the text that the model sees for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from gradmem_adapter.utils.kinds import check_kind

Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages as chat templates take them: `[{"role": "user", "content": "..."}]`."""

Prompt: TypeAlias = str | Chat


STUDY_REQUEST = "Write a short question that the text above answers."
STUDY_OPENINGS = ("What", "Who", "Why", "Where", "How", "When")
"""With `objective="self_study"`: how a model is asked for questions about a text, and the words that these begin with,
in turn."""


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Convert one prompt or several to a list."""
    if isinstance(prompts, str):
        return [prompts]
    check_kind("prompts", prompts, Sequence, "a text, a list of chat messages, or a list of these")
    if prompts and isinstance(prompts[0], Mapping):
        return [cast(Chat, prompts)]
    return cast(list[Prompt], list(prompts))


def format_query(
    prompt: Prompt,
    query_format: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, bool]:
    """The text a model sees for a prompt, and whether it still needs the tokenizer's special tokens.

    Args:
        prompt (`str` or `list[dict]`): a text, formatted by `query_format`, or chat messages, which always go through
            the tokenizer's chat template.
        query_format (`str`): as in `GradMemConfig`.
        tokenizer (`PreTrainedTokenizerBase`): provides the chat template.
        tools (`list[dict]`, *optional*): tools for chat templates that support them, as JSON schemas.
        chat_template_kwargs (`Mapping`, *optional*): other arguments for the chat template, such as `enable_thinking`.

    Raises:
        ValueError: the prompt is chat messages or the format `"chat"`, but the tokenizer has no chat template; or a
            message is invalid.
    """
    check_kind("A prompt", prompt, Sequence, "a text or a list of chat messages")
    if isinstance(prompt, str) and query_format == "text":
        return prompt, True
    if isinstance(prompt, str) and query_format != "chat":
        return query_format.replace("{query}", prompt), True
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [_message(m) for m in prompt]
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, which chat messages and query_format='chat' need. Pass the "
            "prompt as text, or set tokenizer.chat_template."
        )
    text = tokenizer.apply_chat_template(
        messages, tools=tools, **{"tokenize": False, "add_generation_prompt": True, **(chat_template_kwargs or {})}
    )
    return str(text), False


def study_tokens(query_format: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of `Study` that state, in tokens, how a model is shown a text and asked about it."""
    mark = "QUERY"
    text, special = format_query(mark, query_format, tokenizer)
    before, _, after = text.partition(mark)

    def ids(part: str, special: bool = False) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=special)["input_ids"])

    request = ids(STUDY_REQUEST)
    return {
        "before": ids(before, special),
        "between": ids("\n\n"),
        "after": ids(after),
        "requests": tuple((request, ids(opening)) for opening in STUDY_OPENINGS),
        "query_ends": ids("?"),
    }


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"content", "tool_calls"} & message.keys() or "role" not in message:
        several = " For one prompt, pass the text itself, not a list." if isinstance(message, str) else ""
        raise ValueError(f"A chat message must be a mapping with a role and a content, got {message!r}.{several}")
    return dict(message)
