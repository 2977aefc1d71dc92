"""From rows of texts to batches for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.prompts import Prompt, format_query
from gradmem_adapter.utils.tokens import check_fits, check_text
from gradmem_adapter.utils.wording import counted

_FORMS = (
    "A row needs 'context', 'query' and 'target', or 'context', 'queries' and 'targets' (lists), and may have "
    "'answers', the accepted references of each target."
)

_SHOWN = 60
"""How many characters of its context identify a row in messages."""


class Example(NamedTuple):
    """A row: a context and the queries on it."""

    context: str
    queries: list[Prompt]
    targets: list[str]
    references: list[list[str]]


@dataclass
class GradMemCollator:
    """Makes batches of rows.

    A row has a `context` and either a `query` with its `target` or lists of `queries` and `targets` on the same
    context, which is then written once. A query is a text or a list of chat messages. `answers` are the references that
    evaluation accepts (default: the target): a list of texts, or, with `queries`, a list of such lists.

    Nothing is ever truncated, and the tokenizer's state (its padding side) is neither read nor changed. A target ends
    with the tokenizer's end token, if it has one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer, with a pad token.
        max_context_length (`int`, *optional*): the most tokens in a context; None: `GradMemTrainer` fills in what fits
            the backbone.
        max_query_length (`int`, *optional*): the most tokens in a query with its target; None: the same.
        query_format (`str`, *optional*, defaults to `"text"`): as in `GradMemConfig`, whose `query_format` it must
            equal for training and inference to agree.

    Raises:
        ValueError: the tokenizer cannot pad.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    max_context_length: int | None = None
    max_query_length: int | None = None
    query_format: str = "text"

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token, which batches of several lengths need. Set tokenizer.pad_token = "
                "tokenizer.eos_token."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]], first: int | None = None) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows (`Sequence[Mapping[str, Any]]`): C rows, with R queries in all.
            first (`int`, *optional*): the number of the first row in messages. None: the number is unknown, as it is
                where a trainer draws the rows, and messages quote the beginning of a row's context.

        Returns:
            context_input_ids, context_attention_mask: [C, N], right padded.
            input_ids, attention_mask, labels: [R, T], query and target, right padded; labels count on the target alone.
            context_index: [R], the context of each query.
            query_input_ids, query_attention_mask: [R, Tq], the query alone, left padded, to generate from.
            targets: R lists of accepted references.

        Raises:
            TypeError, ValueError: a row cannot be used; the message names it.
        """
        if not rows:
            raise ValueError("There are no rows to make a batch from.")
        names = [_name(place, row, first) for place, row in enumerate(rows)]
        examples = [read_row(name, row) for name, row in zip(names, rows, strict=True)]
        for name, example in zip(names, examples, strict=True):
            check_fits(f"{name}: the context", example.context, self.tokenizer, self.max_context_length)
        contexts = self._encode([example.context for example in examples], special=True)
        for name, ids in zip(names, contexts, strict=True):
            self._check_context(name, ids)
        context_index = [i for i, example in enumerate(examples) for _ in example.queries]
        queries = self._queries([query for example in examples for query in example.queries])
        targets = self._targets([target for example in examples for target in example.targets])
        for i, query, target in zip(context_index, queries, targets, strict=True):
            if not query:
                raise ValueError(f"{names[i]}: the query has no tokens. Leave it out.")
            if not target:
                raise ValueError(f"{names[i]}: the target has no tokens. Leave the query out.")
            _check_length(
                f"{names[i]}: query and target", len(query) + len(target), self.max_query_length, "Shorten them"
            )
        context_ids, context_mask = self._pad(contexts, "right")
        sequences = [query + target for query, target in zip(queries, targets, strict=True)]
        input_ids, attention_mask = self._pad(sequences, "right")
        labels = [[IGNORED] * len(query) + target for query, target in zip(queries, targets, strict=True)]
        query_ids, query_mask = self._pad(queries, "left")
        return {
            # The contexts come first: Transformers takes the size of a batch from its first tensor.
            "context_input_ids": context_ids,
            "context_attention_mask": context_mask,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": pad(labels, "right", IGNORED)[0],
            "context_index": torch.tensor(context_index),
            "query_input_ids": query_ids,
            "query_attention_mask": query_mask,
            "targets": [references for example in examples for references in example.references],
        }

    def may_not_fit(self, example: Example) -> bool:
        """Whether a row could have too many tokens or none, without tokenizing it.

        A token has at least a byte. What a chat template adds is assumed to take at most half of the limit."""
        if not all(str(text).strip() for text in (example.context, *example.queries, *example.targets)):
            return True
        asked = [f"{query}{target}" for query, target in zip(example.queries, example.targets, strict=True)]
        limits = [(example.context, self.max_context_length), *((text, self.max_query_length) for text in asked)]
        return any(limit is not None and 2 * len(text.encode(errors="replace")) > limit for text, limit in limits)

    def longest_target(self, row: Mapping[str, Any]) -> int:
        """The number of tokens in the longest text that a query of the row may be answered with."""
        example = read_row("The row", row)
        texts = [*example.targets, *(text for accepted in example.references for text in accepted)]
        return max(map(len, self._targets(texts)))

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        """Token ids of each text, from one call of the tokenizer."""
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=special)["input_ids"]] if texts else []

    def _check_context(self, name: str, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"{name}: the context has no tokens, so there is nothing to write. Leave the row out.")
        advice = "Split it into several rows (and read their states side by side), or shorten it yourself"
        _check_length(f"{name}: the context", len(ids), self.max_context_length, advice)

    def _queries(self, queries: list[Prompt]) -> list[list[int]]:
        formatted = [format_query(query, self.query_format, self.tokenizer) for query in queries]
        encoded = {flag: iter(self._encode([t for t, f in formatted if f is flag], flag)) for flag in (True, False)}
        return [next(encoded[special]) for _, special in formatted]

    def _targets(self, targets: list[str]) -> list[list[int]]:
        """The tokens of targets, with an end token."""
        eos = self.tokenizer.eos_token_id
        end = [eos] if eos is not None else []
        return [ids + end if ids else ids for ids in self._encode(targets, special=False)]

    def _pad(self, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        return pad(rows, side, int(self.tokenizer.pad_token_id))


def read_row(name: str, row: Mapping[str, Any]) -> Example:
    """A row in one form. Keys that are None count as absent, as `datasets` fills them in.

    Raises:
        TypeError, ValueError: the row is not one, lacks something or is contradictory; the message says which and what.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"{name} is a {type(row).__name__}, not a mapping. {_FORMS}")
    given = {key for key in ("query", "target", "queries", "targets") if row.get(key) is not None}
    one, several = given & {"query", "target"}, given & {"queries", "targets"}
    if one and several:
        raise ValueError(f"{name} mixes {' and '.join(sorted(given))}. {_FORMS}")
    if missing := ({"queries", "targets"} if several else {"query", "target"}) - given:
        raise ValueError(f"{name} has no {' and no '.join(sorted(missing))}. {_FORMS}")
    context, answers = row.get("context"), row.get("answers")
    if not isinstance(context, str) or not context:
        raise ValueError(f"{name} has no context to write (it is {context!r}). {_FORMS}")
    check_text(name, context)
    if several:
        queries, targets = (_list(name, key, row[key]) for key in ("queries", "targets"))
        references = [[target] for target in targets] if answers is None else _list(name, "answers", answers)
    else:
        queries, targets = [row["query"]], [row["target"]]
        references = [targets if answers is None else answers]
    if not len(queries) == len(targets) == len(references):
        raise ValueError(
            f"{name} has {counted(len(queries), 'query')}, {counted(len(targets), 'target')} and references for "
            f"{len(references):,}. Each query needs one target."
        )
    if not queries:
        raise ValueError(f"{name} has no queries: its list is empty. {_FORMS}")
    for query, target, accepted in zip(queries, targets, references, strict=True):
        if not isinstance(query, str | Sequence):
            raise ValueError(
                f"{name} has a query of type {type(query).__name__} ({query!r}). Pass a text or a list of chat "
                "messages."
            )
        if not query:
            raise ValueError(f"{name} has an empty query ({query!r}). Pass a text or a list of chat messages.")
        if not isinstance(target, str):
            raise ValueError(f"{name} has a target of type {type(target).__name__} ({target!r}). Pass a text.")
        for text in (query, target):
            if isinstance(text, str):
                check_text(name, text)
        if not target:
            raise ValueError(f"{name} has an empty target ({target!r}). Pass the text of the answer.")
        if isinstance(accepted, str) or not accepted or not all(isinstance(text, str) for text in accepted):
            raise ValueError(f"{name}: the 'answers' to a query must be a non-empty list of texts, got {accepted!r}.")
    return Example(context, list(queries), list(targets), [list(accepted) for accepted in references])


def _name(place: int, row: Any, first: int | None) -> str:
    """The name of a row in messages, by which it can be found in the dataset."""
    if first is not None:
        return f"Row {first + place}"
    context = row.get("context") if isinstance(row, Mapping) else None
    if not isinstance(context, str):
        return f"Row {place} of the batch"
    return f"Row {place} of the batch (context {context if len(context) <= _SHOWN else context[:_SHOWN] + '...'!r})"


def _list(name: str, key: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name}: {key!r} must be a list, got {type(value).__name__}. {_FORMS}")
    return list(value)


def _check_length(what: str, length: int, limit: int | None, advice: str) -> None:
    if limit is not None and length > limit:
        raise ValueError(f"{what} of {length} tokens is longer than the {limit} that fit. {advice}.")
