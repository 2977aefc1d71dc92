"""Sentence embeddings of texts in a memory store: computed once, kept in its index."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmem_adapter.store.index import Index

_AT_ONCE = 256
"""Texts per call of an embedding."""


@dataclass(frozen=True)
class Embedding:
    """A sentence embedding.

    Args:
        name (`str`): the name of its model. The index keeps vectors under it: another model needs another name.
        embed (`Callable`): takes a list of n texts and returns n vectors of d numbers, such as the `encode` of a
            `SentenceTransformer` or the `embed_documents` of LangChain's `Embeddings`.
        embed_query (`Callable`, *optional*): takes one question and returns its vector, if the model embeds questions
            differently: `embed_query` of LangChain's `Embeddings`, `encode_query` of a `SentenceTransformer`. None:
            `embed`.
    """

    name: str
    embed: Callable[[list[str]], Any]
    embed_query: Callable[[str], Any] | None = None

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Vectors `[n, d]` of length 1, on the CPU.

        Args:
            texts (`Sequence[str]`): n texts.

        Raises:
            ValueError: `embed` returned something else, or vectors that are not finite.
        """
        return self._normalized(self.embed(list(texts)), len(texts))

    def query_vector(self, query: str) -> Tensor:
        """The vector `[d]` of a question; see `vectors`."""
        if self.embed_query is None:
            return self.vectors([query])[0]
        return self._normalized(torch.as_tensor(self.embed_query(query))[None], 1)[0]

    def _normalized(self, found: Any, count: int) -> Tensor:
        found = torch.as_tensor(found, dtype=torch.float32, device="cpu")
        if found.dim() != 2 or len(found) != count or not found.isfinite().all():
            raise ValueError(
                f"The embedding {self.name!r} must return one vector of finite numbers for each text; for {count} "
                f"texts it returned an array of shape {list(found.shape)}."
            )
        return torch.nn.functional.normalize(found, dim=1)


@dataclass(frozen=True)
class _Vectors:
    """Embeddings read from an index, kept in memory until the index changes.

    Args:
        of (`tuple`): the cache key: which states, which embedding model, and how often the index had changed.
        ids (`Tensor`): `[n]`, ids of the states.
        vectors (`Tensor`): `[n, d]`, their vectors.
    """

    of: tuple[Any, ...]
    ids: Tensor
    vectors: Tensor


def cosines(
    index: Index, embedding: Embedding, query: str, where: str, values: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Ids `[n]` of states that have a text, and the cosines `[n]` of these with a question.

    Texts that have no vector of this model are embedded first, and each batch is kept even if a later one fails.
    Vectors stay in memory until the index changes: reading them takes longer than everything else.

    Args:
        index (`Index`): the store's index. It keeps the vectors of one model at a time.
        embedding (`Embedding`): embeds texts and question.
        query (`str`): the question.
        where, values: which states, as an SQL condition and its named values.

    Raises:
        ValueError: see `Embedding.vectors`; or the vectors in the index have another width.
        OSError: the index cannot be written.
    """
    vector = embedding.query_vector(query)
    which = values | {"model": embedding.name}
    known, missing = _read(index, where, which, len(vector))
    if missing:
        for begin in range(0, len(missing), _AT_ONCE):
            _embed(index, embedding, missing[begin : begin + _AT_ONCE])
        known, _ = _read(index, where, which, len(vector))
    index.vectors = known
    return known.ids, known.vectors @ vector


def _read(index: Index, where: str, which: dict[str, Any], width: int) -> tuple[_Vectors, list[int]]:
    """The vectors of states, and the ids of those that have none."""
    with index.reading() as connection:
        (changes,) = connection.execute("SELECT count FROM changes").fetchone()
        of = (changes, *which.values(), width)
        known: _Vectors | None = index.vectors
        if known is not None and known.of == of:
            return known, []
        sql = f"""
            SELECT states.id, CASE WHEN model = :model THEN vector END FROM states LEFT JOIN embeddings USING (id)
            WHERE text IS NOT NULL AND {where}
        """
        rows = connection.execute(sql, which).fetchall()
    kept = [(number, stored) for number, stored in rows if stored is not None]
    data = bytearray().join(stored for _, stored in kept)
    if len(data) != len(kept) * width * torch.float32.itemsize:
        raise ValueError(
            f"The embedding {which['model']!r} returns vectors of {width} numbers, but under that name the index has "
            "vectors of another length. Give each model its own name."
        )
    vectors = torch.frombuffer(data, dtype=torch.float32) if kept else torch.zeros(0)
    ids = torch.tensor([number for number, _ in kept], dtype=torch.long)
    return _Vectors(of, ids, vectors.view(-1, width)), [number for number, stored in rows if stored is None]


def _embed(index: Index, embedding: Embedding, states: Sequence[int]) -> None:
    with index.reading() as connection:
        chosen = "SELECT id, text FROM states WHERE text IS NOT NULL AND id IN (SELECT value FROM json_each(?))"
        found = connection.execute(chosen, (json.dumps(states),)).fetchall()
    vectors = embedding.vectors([text for _, text in found]).numpy()
    with index.writing() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO embeddings SELECT id, ?, ? FROM states WHERE id = ? AND text = ?",  # if still there
            [(embedding.name, vector.tobytes(), *row) for row, vector in zip(found, vectors, strict=True)],
        )
