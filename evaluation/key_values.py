"""Key-value pairs as tokens (GradMem, section 4.1): contexts of pairs, and queries that ask for the value of a key.

    context  !k1k2:v1v2! for each pair, then |      query  ?!k1k2:      target  v1v2!|

There is one token per character. Keys are unique within a context, and all characters are random, so that only the
context tells the value of a key.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, EDGE, COLON, END, ASK = "<pad>", "!", ":", "|", "?"
ALPHABET = string.ascii_letters + string.digits
VOCABULARY = (PAD, EDGE, COLON, END, ASK, *ALPHABET)
MOST_PAIRS = len(ALPHABET) ** 2
_FIRST = len(VOCABULARY) - len(ALPHABET)
_PAIR = 7
"""Tokens of a pair."""


def pairs_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `|` ends a text."""
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, eos_token=END)


def context_length(pairs: int) -> int:
    """The length in tokens of a context of this many pairs."""
    return _PAIR * pairs + 1


def sample_pairs(
    contexts: int,
    queries: int,
    most: int,
    fewest: int | None = None,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Draw contexts of pairs and queries on them, entirely on `device`.

    Args:
        contexts (`int`): C, the number of contexts.
        queries (`int`): Q, the number of queries on each context; on different pairs if there are enough.
        most (`int`): the number of pairs in the longest context.
        fewest (`int`, *optional*, defaults to `most`): each context draws its number of pairs from `fewest` to `most`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the tensors are made.
        generator (`torch.Generator`, *optional*): a generator on that device; None: its default generator.

    Returns:
        The arguments of a model's forward: context_input_ids and context_attention_mask [C, N], right padded; input_ids
        and labels [C * Q, T], query and target, all of one length; context_index [C * Q].
    """
    fewest = most if fewest is None else fewest
    options: dict[str, Any] = {"generator": generator, "device": device}

    def token(name: str, *shape: int) -> Tensor:
        return torch.full(shape, VOCABULARY.index(name), device=device)

    counts = torch.randint(fewest, most + 1, (contexts, 1), **options)
    numbers = torch.rand(contexts, MOST_PAIRS, **options).topk(most, dim=1).indices  # distinct
    keys = torch.stack([numbers % len(ALPHABET), numbers // len(ALPHABET)], dim=2) + _FIRST
    values = torch.randint(_FIRST, len(VOCABULARY), (contexts, most, 2), **options)
    edge, colon = token(EDGE, contexts, most, 1), token(COLON, contexts, most, 1)
    text = torch.cat([edge, keys, colon, values, edge], dim=2).flatten(1)
    text = torch.cat([text, token(PAD, contexts, 1)], dim=1)
    places, end = torch.arange(text.shape[1], device=device), counts * _PAIR
    text = torch.where(places < end, text, token(PAD)).masked_fill(places == end, VOCABULARY.index(END))

    if queries <= fewest:
        order = torch.rand(contexts, most, **options)
        asked = order.masked_fill(torch.arange(most, device=device) >= counts, -1).topk(queries, dim=1).indices
    else:
        asked = (torch.rand(contexts, queries, **options) * counts).long()
    rows = torch.arange(contexts, device=device)[:, None]
    marks = [token(name, contexts, queries, 1) for name in (ASK, EDGE, COLON, EDGE, END)]
    query = torch.cat([marks[0], marks[1], keys[rows, asked], marks[2]], dim=2).flatten(0, 1)
    target = torch.cat([values[rows, asked], marks[3], marks[4]], dim=2).flatten(0, 1)
    return {
        "context_input_ids": text,
        "context_attention_mask": (places <= end).long(),
        "input_ids": torch.cat([query, target], dim=1),
        "labels": torch.cat([torch.full_like(query, -100), target], dim=1),
        "context_index": rows.expand(-1, queries).flatten(),
    }


def as_rows(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The contexts of `sample_pairs` with their queries and targets as texts."""
    rows: list[dict[str, Any]] = [
        {"context": _text(ids[mask.bool()]), "queries": [], "targets": []}
        for ids, mask in zip(batch["context_input_ids"], batch["context_attention_mask"], strict=True)
    ]
    for row, ids, labels in zip(batch["context_index"].tolist(), batch["input_ids"], batch["labels"], strict=True):
        rows[row]["queries"].append(_text(ids[labels == -100]))
        rows[row]["targets"].append(_text(ids[labels != -100]))
    return rows


def _text(ids: Tensor) -> str:
    return "".join(VOCABULARY[i] for i in ids.tolist())
