"""Sentence embeddings of texts in a memory store: made once, kept in its index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmem_adapter.store.index import Index

_AT_ONCE = 256
"""Texts that are given to an embedding together."""


@dataclass(frozen=True)
class Embedding:
    """A sentence embedding.

    Args:
        name (`str`): of its model. The index keeps vectors under it: another model needs another name.
        embed (`Callable`): takes a list of n texts and returns n vectors of d numbers, such as the `encode` of a
            `SentenceTransformer` or the `embed_documents` of LangChain's `Embeddings`.
    """

    name: str
    embed: Callable[[list[str]], Any]

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Vectors `[n, d]` of length 1, on the CPU.

        Args:
            texts (`Sequence[str]`): n of them.

        Raises:
            ValueError: `embed` returned something else, or vectors that are not finite.
        """
        found = torch.as_tensor(self.embed(list(texts)), dtype=torch.float32, device="cpu")
        if found.dim() != 2 or len(found) != len(texts) or not found.isfinite().all():
            raise ValueError(
                f"The embedding {self.name!r} must return one vector of finite numbers for each text; for {len(texts)} "
                f"it returned an array of shape {list(found.shape)}."
            )
        return torch.nn.functional.normalize(found, dim=1)


def cosines(
    index: Index, embedding: Embedding, query: str, where: str, values: Mapping[str, Any]
) -> tuple[list[int], Tensor]:
    """Ids of states that have a text, and the cosines `[n]` of these with a question.

    Texts that have no vector of this model are embedded first; what is done is kept, whatever happens later.

    Args:
        index (`Index`): of the store. It keeps the vectors of one model at a time.
        embedding (`Embedding`): of texts and question.
        query (`str`): the question.
        where, values: which states, in SQL with named values.

    Raises:
        ValueError: see `Embedding.vectors`; or the vectors in the index have another width.
        OSError: the index cannot be written.
    """
    sql = f"""
        SELECT states.id, CASE WHEN model = :model THEN vector END FROM states LEFT JOIN embeddings USING (id)
        WHERE text IS NOT NULL AND {where}
    """

    def read() -> list[tuple[int, bytes | None]]:
        with index.reading() as connection:
            return connection.execute(sql, {**values, "model": embedding.name}).fetchall()

    rows = read()
    if missing := [number for number, stored in rows if stored is None]:
        for begin in range(0, len(missing), _AT_ONCE):
            _embed(index, embedding, missing[begin : begin + _AT_ONCE])
        rows = read()
    (vector,) = embedding.vectors([query])
    kept = [(number, stored) for number, stored in rows if stored is not None]
    data = bytearray().join(stored for _, stored in kept)
    if len(data) != len(kept) * vector.nbytes:
        raise ValueError(
            f"The embedding {embedding.name!r} has {len(vector)} numbers, and the index has vectors of another length "
            "under that name: give another model another name."
        )
    vectors = torch.frombuffer(data, dtype=torch.float32) if kept else vector[:0]
    return [number for number, _ in kept], vectors.view(-1, len(vector)) @ vector


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
