"""Structured output for LangChain: schemas as response formats, and answers as objects."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass


def response_format(schema: dict[str, Any] | type, strict: bool | None) -> dict[str, Any]:
    """A schema as a response format, in the form that OpenAI and LangChain's agents use.

    Args:
        schema (`dict` or `type`): a JSON schema, a tool's schema, a TypedDict or a pydantic class.
        strict (`bool`, *optional*): True: all properties are required.
    """
    if not isinstance(schema, dict) or schema.keys() & {"function", "parameters", "input_schema"} or strict:
        schema = convert_to_json_schema(schema, strict=strict)
    return {"type": "json_schema", "json_schema": {"name": schema.get("title", "answer"), "schema": schema}}


class _WholeJson(JsonOutputParser):
    """Raises for incomplete JSON, also at the end of a stream, where LangChain's parser would repair it."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        message = cast(AIMessage, cast(ChatGeneration, result[0]).message)
        if reason := message.response_metadata.get("finish_reason"):
            try:
                json.loads(message.text)
            except json.JSONDecodeError as error:
                raise OutputParserException(
                    "The answer ended before its JSON was complete, by "
                    f"{'max_tokens' if reason == 'length' else reason}: raise max_tokens, or bound the schema "
                    "(maxLength, maxItems).",
                    llm_output=message.text,
                ) from error
        return super().parse_result(result, partial=partial)


class _WholePydantic(_WholeJson, PydanticOutputParser):
    """The same, for objects of a pydantic class."""


def parsed(llm: Runnable[Any, Any], schema: dict[str, Any] | type, include_raw: bool) -> Runnable[Any, Any]:
    """A model that returns objects of a pydantic class, or a `dict` for any other schema."""
    parser: JsonOutputParser = _WholeJson()
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        parser = _WholePydantic(pydantic_object=schema)
    if not include_raw:
        return llm | parser
    right = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    wrong = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | right.with_fallbacks([wrong], exception_key="parsing_error")
