"""Which of many states a question needs: by the words of their texts, and by a sentence embedding."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmem_adapter.store.embedding import Embedding, cosines
from gradmem_adapter.store.entry import Entry
from gradmem_adapter.store.index import Index, select
from gradmem_adapter.store.whole import whole_in
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.tokens import check_text
from gradmem_adapter.utils.wording import counted

_WORD = re.compile(r"\w+")
_OF_QUESTIONS = {
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "could", "did", "do", "does", "for", "from", "had",
    "has", "have", "how", "in", "is", "it", "its", "many", "much", "of", "on", "or", "that", "the", "this", "to",
    "was", "were", "what", "when", "where", "which", "who", "whom", "whose", "why", "will", "with", "would",
}  # fmt: skip
"""English words that say nothing about a question's topic. BM25 would weight them highly if few texts have them."""
_BY_WORDS = 64
"""With an embedding, only this many of the best states by BM25 get a score for their words."""
_ALL = 2**32
"""No limit, as a number that fits SQLite's 64-bit integers."""
_STATES = """
    fingerprint = :fingerprint
    AND (:keys IS NULL OR key IN (SELECT value FROM json_each(:keys)))
    AND (:source IS NULL OR EXISTS (SELECT 1 FROM places WHERE places.key = states.key AND places.source = :source))
"""


@dataclass(frozen=True)
class Choice:
    """A state for a question.

    Args:
        entry (`Entry`): the state, with the first eligible place of those where its text was found.
        score (`float`): higher is better. Not comparable with scores for other questions.
    """

    entry: Entry
    score: float


def choose(
    index: Index,
    fingerprint: str,
    query: str,
    k: int,
    source: str | None,
    embedding: Embedding | None,
    *,
    keys: str | Iterable[str] | None = None,
    whole: bool = False,
) -> list[Choice]:
    """The best states for a question; `MemoryStore.choose` explains the arguments.

    The score of a state is its BM25. With an embedding, it is its BM25 relative to the best state's, plus the cosine:

        s(i)  =  bm25(i) / max_j bm25(j)  +  cos(i)
    """
    if type(k) is not int or k < 1:
        raise ValueError(f"k, the number of states to return, must be an integer of at least 1, got {k!r}.")
    k = min(k, _ALL)
    check_text("The query", query)
    check_kind("keys", keys, Iterable | None, "a list of keys")
    if keys is not None:
        keys = json.dumps([keys] if isinstance(keys, str) else list(keys))
    values = {"fingerprint": fingerprint, "source": source, "keys": keys}
    looked_at = _ALL if whole else k
    near = None if embedding is None else cosines(index, embedding, query, _STATES, values)
    with index.reading() as connection:
        if near is None:
            scores = _by_words(connection, query, looked_at, values)
        else:
            words = _by_words(connection, query, max(k, _BY_WORDS), values)
            scores = _with_words(*near, words, looked_at)
        if not scores:
            _check_states(connection, fingerprint)
        counts = whole_in(connection) if whole else None
        return list(itertools.islice(_choices(connection, scores, source, counts), k))


def search_scores(index: Index, fingerprint: str, query: str, keys: Sequence[str]) -> list[float]:
    """How well a question's words match each of some states, for `GradMemPipeline.select`.

    Args:
        index (`Index`): the index of their store.
        fingerprint (`str`): the fingerprint of the model that is to read them.
        query (`str`): the question.
        keys (`Sequence[str]`): the keys of the states.

    Returns:
        `list[float]`: BM25 of each; 0 if its text has no word of the question, or is not kept.
    """
    values = {"fingerprint": fingerprint, "source": None, "keys": json.dumps(list(keys))}
    with index.reading() as connection:
        scores = _by_words(connection, query, _ALL, values)
        found = {choice.entry.key: choice.score for choice in _choices(connection, scores, None, None)}
    return [found.get(key, 0.0) for key in keys]


def _choices(
    connection: sqlite3.Connection,
    scores: dict[int, float],
    source: str | None,
    counts: Callable[[Entry], bool] | None,
) -> Iterator[Choice]:
    """Each state with the first of its places for which `counts` is true (None: any). Skips states without one."""
    for state, score in scores.items():
        places = select(connection, "states.id = ? AND (? IS NULL OR source = ?)", (state, source, source))
        entry = next(filter(counts, places), None)
        if entry is not None:
            yield Choice(entry, score)


def match_any(query: str) -> str | None:
    """The query for FTS5: texts with any word that says what a question is about, or else with any word of it.

    Returns:
        `str`, *optional*: the argument of MATCH; None: the question has no words.
    """
    words = dict.fromkeys(_WORD.findall(query.lower()))
    wanted = [word for word in words if word not in _OF_QUESTIONS] or words
    return " OR ".join(f'"{word}"' for word in wanted) or None


def _by_words(connection: sqlite3.Connection, query: str, limit: int, values: dict[str, Any]) -> dict[int, float]:
    """BM25 scores of the best states by id, best first."""
    if (match := match_any(query)) is None:
        return {}
    found = connection.execute(
        f"""
        SELECT states.id, -rank FROM texts JOIN states ON states.id = texts.rowid
        WHERE texts MATCH :match AND {_STATES} ORDER BY rank LIMIT :limit
        """,
        {**values, "match": match, "limit": limit},
    )
    return dict(found.fetchall())


def _with_words(ids: Tensor, cosine: Tensor, words: dict[int, float], k: int) -> dict[int, float]:
    """Scores of the best states by id, best first: cosine plus relative BM25."""
    best = max(words.values(), default=1.0)
    both = cosine.clone()
    for i in torch.isin(ids, torch.tensor(list(words), dtype=torch.long)).nonzero().flatten().tolist():
        both[i] += words[int(ids[i])] / best
    top, places = both.topk(min(k, len(ids)))
    return dict(zip(ids[places].tolist(), top.tolist(), strict=True))


def _check_states(connection: sqlite3.Connection, fingerprint: str) -> None:
    """Raise `ValueError` if no question can find a state: this model wrote none, or the store keeps no texts."""
    counts = "SELECT count(*), total(fingerprint = ?), total(fingerprint = ? AND text IS NOT NULL) FROM states"
    states, own, texts = connection.execute(counts, (fingerprint, fingerprint)).fetchone()
    if states and not own:
        raise ValueError(
            f"This store has {counted(states, 'state')}, but none was written by this model ({fingerprint}), which "
            "would read them as noise. Write the texts again with this model."
        )
    if own and not texts:
        raise ValueError(
            "This store keeps no texts (keep_text=False), by which states are chosen. Open it with keep_text=True and "
            "add the texts again, which keeps the existing states, or pass keys to MemoryStore.get()."
        )
