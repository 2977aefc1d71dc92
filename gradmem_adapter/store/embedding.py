"""Sentence embeddings of texts in a memory store: made once, kept in its index."""

from __future__ import annotations

import sqlite3
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


def embed_texts(index: Index, embedding: Embedding) -> None:
    """Embed all texts that have no vector of this model yet; what is done is kept, whatever happens later.

    Args:
        index (`Index`): of the store.
        embedding (`Embedding`): by what.

    Raises:
        ValueError: see `Embedding.vectors`.
        OSError: the index cannot be written.
    """
    with index.reading() as connection:
        missing = connection.execute(
            """
            SELECT key, text FROM states WHERE text IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM embeddings WHERE embeddings.key = states.key AND model = ?)
            """,
            (embedding.name,),
        ).fetchall()
    for begin in range(0, len(missing), _AT_ONCE):
        part = missing[begin : begin + _AT_ONCE]
        vectors = embedding.vectors([text for _, text in part]).numpy()
        with index.writing() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO embeddings SELECT key, ?, ? FROM states WHERE key = ?",  # it may be gone by now
                [(embedding.name, vector.tobytes(), key) for (key, _), vector in zip(part, vectors, strict=True)],
            )


def cosines(
    connection: sqlite3.Connection, embedding: Embedding, query: str, where: str, values: Mapping[str, Any]
) -> dict[str, float]:
    """By key, the cosine of each state's text with a question.

    Args:
        connection (`Connection`): to the index.
        embedding (`Embedding`): what made the vectors there.
        query (`str`): the question.
        where, values: which states, in SQL with named values.

    Raises:
        ValueError: the vectors in the index have another width: they are of another model of that name.
    """
    rows = connection.execute(
        f"SELECT key, vector FROM embeddings JOIN states USING (key) WHERE model = :model AND {where}",
        {**values, "model": embedding.name},
    ).fetchall()
    if not rows:
        return {}
    (vector,) = embedding.vectors([query])
    if wrong := {len(stored) // 4 for _, stored in rows} - {len(vector)}:
        raise ValueError(
            f"The embedding {embedding.name!r} has {len(vector)} numbers, and the index has vectors of {min(wrong)} "
            "under that name: give another model another name."
        )
    stored = torch.frombuffer(bytearray().join(data for _, data in rows), dtype=torch.float32).view(len(rows), -1)
    return dict(zip((key for key, _ in rows), (stored @ vector).tolist(), strict=True))
