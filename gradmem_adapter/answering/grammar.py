"""Constrained decoding by a JSON schema: only tokens that can still lead to valid JSON are allowed."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from gradmem_adapter.pipeline import GradMemPipeline

if TYPE_CHECKING:
    from llguidance import LLTokenizer

AVAILABLE = importlib.util.find_spec("llguidance") is not None
"""Whether the library for constrained decoding is installed."""
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON's usual white space. If any white space were allowed, small models could generate it without end."""
_AS_IS = frozenset({"allOf", "const", "default", "enum", "examples"})
"""Keywords of JSON Schema whose values stay open: values rather than schemas, and allOf, whose parts share their
properties."""
_BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Keywords that hold schemas by names, which may be those of keywords."""
_tokenizers: WeakKeyDictionary[GradMemPipeline, LLTokenizer] = WeakKeyDictionary()
_making = threading.Lock()


def grammar_of(pipeline: GradMemPipeline, wanted: Any) -> str:
    """The grammar of a response format, for the library for constrained decoding.

    Args:
        pipeline (`GradMemPipeline`): what is to answer.
        wanted (`dict`): `{"type": "json_schema", "json_schema": {"schema": ...}}`.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: `wanted` is not such a response format, or the library does not support the schema or the kind of
            tokenizer.
    """
    if not AVAILABLE:
        raise ModuleNotFoundError(
            "Structured output needs the package 'llguidance' for constrained decoding: pip install "
            '"gradmem-adapter[structured-output]". Without it, ask for JSON in the prompt and parse the answer with a '
            "PydanticOutputParser.",
            name="llguidance",
        )
    from llguidance import LLMatcher

    schema = wanted.get("json_schema", {}).get("schema") if isinstance(wanted, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValueError(
            'response_format must be {"type": "json_schema", "json_schema": {"schema": ...}}, as '
            f"with_structured_output makes it, got {wanted!r}."
        )
    grammar = str(LLMatcher.grammar_from_json_schema(_closed(dict(schema)), defaults=_STYLE))
    if problem := LLMatcher.validate_grammar(grammar, _tokenizer(pipeline)):
        raise ValueError(f"The schema is not supported by constrained decoding: {problem}")
    return grammar


def _closed(schema: Any) -> Any:
    """A schema whose objects allow no properties other than those named, unless it says so explicitly.

    JSON Schema allows any others by default, but users who ask a model for an answer do not want them.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {}
    for keyword, part in schema.items():
        if keyword in _BY_NAME and isinstance(part, dict):
            parts[keyword] = {name: _closed(own) for name, own in part.items()}
        else:
            parts[keyword] = part if keyword in _AS_IS else _closed(part)
    return {"additionalProperties": False, **parts} if isinstance(schema.get("properties"), dict) else parts


def _tokenizer(pipeline: GradMemPipeline) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    with _making:
        if pipeline not in _tokenizers:  # takes a second for a large vocabulary
            eos = pipeline.model.generation_config.eos_token_id
            _tokenizers[pipeline] = from_tokenizer(cast(PreTrainedTokenizerFast, pipeline.tokenizer), eos_token=eos)
        return _tokenizers[pipeline]


class Constraint(LogitsProcessor):
    """Masks, for each row of a batch, the tokens that its grammar does not allow next.

    An adapter that was trained to give bare answers ends the text where JSON needs a closing quote. The quote therefore
    gets the probability of the end as well."""

    def __init__(self, pipeline: GradMemPipeline, grammar: str, rows: int) -> None:
        from llguidance import LLMatcher

        tokenizer = _tokenizer(pipeline)
        self.matchers = [LLMatcher(tokenizer, grammar) for _ in range(rows)]
        (self.quote,) = tokenizer.tokenize_str('"')
        self.closing = [self.quote, *tokenizer.eos_tokens]
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.started:  # the matcher of an ended row only sees padding, and allows only the end
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
