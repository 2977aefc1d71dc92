"""Answers that keep to a JSON schema: each token is one with which the answer can still be such JSON."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from gradmem_adapter import GradMemPipeline

if TYPE_CHECKING:
    from llguidance import LLTokenizer

AVAILABLE = importlib.util.find_spec("llguidance") is not None
"""Whether there is a library for constrained decoding."""
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As JSON is mostly written. Free white space is where a small model loses itself."""
_tokenizers: WeakKeyDictionary[GradMemPipeline, LLTokenizer] = WeakKeyDictionary()
_making = threading.Lock()


def response_format(schema: dict[str, Any] | type, strict: bool | None) -> dict[str, Any]:
    """A schema as calls take it, in the form that OpenAI and LangChain's agents have for it.

    Args:
        schema (`dict` or `type`): a JSON schema, a tool's, a TypedDict or a pydantic class.
        strict (`bool`, *optional*): True: all properties are required.
    """
    if not isinstance(schema, dict) or schema.keys() & {"function", "parameters", "input_schema"} or strict:
        schema = convert_to_json_schema(schema, strict=strict)
    return {"type": "json_schema", "json_schema": {"name": schema.get("title", "answer"), "schema": schema}}


def grammar_of(pipeline: GradMemPipeline, wanted: Any) -> str:
    """What a response format allows, as the library for constrained decoding takes it.

    Args:
        pipeline (`GradMemPipeline`): who is to answer.
        wanted (`dict`): `{"type": "json_schema", "json_schema": {"schema": ...}}`.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: it is no response format of this kind; or the library does not know what the schema asks for, or
            does not know the tokenizer's kind.
    """
    if not AVAILABLE:
        raise ModuleNotFoundError(
            "Structured output needs the package 'llguidance', which keeps a local model to a schema while it decodes: "
            'pip install "gradmem-adapter[structured-output]". Without it, ask for JSON in the prompt and parse the '
            "answer with a PydanticOutputParser.",
            name="llguidance",
        )
    from llguidance import LLMatcher

    schema = wanted.get("json_schema", {}).get("schema") if isinstance(wanted, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValueError(
            'A response_format is {"type": "json_schema", "json_schema": {"schema": ...}}, as with_structured_output '
            f"makes it, got {wanted!r}."
        )
    grammar = str(LLMatcher.grammar_from_json_schema(_closed(dict(schema)), defaults=_STYLE))
    if problem := LLMatcher.validate_grammar(grammar, _tokenizer(pipeline)):
        raise ValueError(f"The schema cannot be decoded by: {problem}")
    return grammar


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it names, and others only where it says so.

    JSON Schema allows any others by default, which nobody who asks a model for an answer means.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    as_is = {"allOf", "const", "default", "enum", "examples"}  # parts of allOf name others' properties too
    parts = {name: part if name in as_is else _closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **parts} if isinstance(schema.get("properties"), dict) else parts


def _tokenizer(pipeline: GradMemPipeline) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    with _making:
        if pipeline not in _tokenizers:  # a second of work for a large vocabulary
            eos = pipeline.model.generation_config.eos_token_id
            _tokenizers[pipeline] = from_tokenizer(cast(PreTrainedTokenizerFast, pipeline.tokenizer), eos_token=eos)
        return _tokenizers[pipeline]


class Constraint(LogitsProcessor):
    """Rules out, for each row of a batch, the tokens that its grammar does not allow next.

    An adapter that was trained to give bare answers ends the text where JSON has a quote first; so the probability of
    the end is the quote's, too.

    Args:
        pipeline (`GradMemPipeline`): who answers.
        grammar (`str`): what `grammar_of` returns.
        rows (`int`): of the batch.
    """

    def __init__(self, pipeline: GradMemPipeline, grammar: str, rows: int) -> None:
        from llguidance import LLMatcher

        tokenizer = _tokenizer(pipeline)
        self.matchers = [LLMatcher(tokenizer, grammar) for _ in range(rows)]
        (self.quote,) = tokenizer.tokenize_str('"')
        self.closing = [self.quote, *tokenizer.eos_tokens]
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.started:  # a row that has ended is padded; its matcher then allows the end alone
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                matcher.consume_token(token)
        self.started = True
        scores = scores.clone()
        scores[:, self.quote] = scores[:, self.closing].logsumexp(dim=1)
        rows = [bytearray(matcher.compute_logit_bias()) for matcher in self.matchers]
        allowed = torch.stack([torch.frombuffer(row, dtype=torch.uint8) for row in rows]).bool()
        more = scores.shape[1] - allowed.shape[1]  # embeddings may be padded beyond the vocabulary
        allowed = torch.nn.functional.pad(allowed, (0, more)).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)


class _WholeJson(JsonOutputParser):
    """LangChain's parser mends JSON that breaks off; here that is an error, at the end of a stream too."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        message = cast(AIMessage, cast(ChatGeneration, result[0]).message)
        if reason := message.response_metadata.get("finish_reason"):
            try:
                json.loads(message.text)
            except json.JSONDecodeError as error:
                raise OutputParserException(
                    f"The answer ended before its JSON was whole, by {'max_tokens' if reason == 'length' else reason}: "
                    "raise max_tokens, or bound the schema (maxLength, maxItems).",
                    llm_output=message.text,
                ) from error
        return super().parse_result(result, partial=partial)


class _WholePydantic(_WholeJson, PydanticOutputParser):
    """The same, for objects of a pydantic class."""


def parsed(llm: Runnable[Any, Any], schema: dict[str, Any] | type, include_raw: bool) -> Runnable[Any, Any]:
    """A model with answers as objects of a pydantic class, or as a `dict` for any other schema.

    Args:
        llm (`Runnable`): gives messages.
        schema (`dict` or `type`): what they keep to.
        include_raw (`bool`): as LangChain's `with_structured_output` has it.
    """
    parser: JsonOutputParser = _WholeJson()
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        parser = _WholePydantic(pydantic_object=schema)
    if not include_raw:
        return llm | parser
    right = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    wrong = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | right.with_fallbacks([wrong], exception_key="parsing_error")
