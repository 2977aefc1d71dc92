"""Documents in, documents out whose content is a reference to a memory state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.callbacks.manager import dispatch_custom_event
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from pydantic import Field, PrivateAttr

from gradmem_adapter import MemoryState

from .references import KEY, marker, references_of
from .writer import MemoryWriter

EVENT = "gradmem_write"
"""The custom event of a write: {"documents", "contexts", "written"}."""


class GradMemCompressor(MemoryWriter, BaseDocumentCompressor, BaseDocumentTransformer):
    """Writes documents into memory states, those that are new in batches that fit into memory.

    A document comes back with the markers of its references as content and the references in `metadata["gradmem"]`,
    beside its own metadata. One that is longer than the model takes is split first and has a reference for each part.
    One that carries references already is left as it is.

    Args:
        pipeline (`GradMemPipeline`): who writes.
        store (`MemoryStateStore`, *optional*, defaults to a new one in memory): where states are kept.
        write_options (`WriteOptions` or its fields as a `dict`, *optional*): how to write.
        fallback (`str`, *optional*): `"text"` leaves a document as text where its fidelity is below `min_fidelity`.
        min_fidelity (`float`, *optional*, defaults to `0.5`): the share of tokens that greedy decoding from memory must
            get back.
    """

    fallback: Literal["text"] | None = None
    min_fidelity: float = Field(default=0.5, ge=0, le=1)

    _fidelity: dict[str, float] = PrivateAttr(default_factory=dict)
    """Greedy fidelity by reference, which decides both text and memory, so that it is measured once."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Write documents into memory.

        Args:
            documents (`Sequence[Document]`): empty ones are left as they are.
            query (`str`): plays no part, so that a document is written once for all queries.
            callbacks (`Callbacks`, *optional*): are told by the custom event `"gradmem_write"` what was written.

        Returns:
            `list[Document]`: new documents, in order; those passed in stay as they are.
        """
        fresh = [d for d in documents if not references_of(d) and d.page_content.strip()]
        parts = [self.split(document.page_content) for document in fresh]
        texts = [text for pieces in parts for text in pieces]
        before = self.store.writes
        references = iter(self.write_texts(texts) if texts else [])
        if callbacks:
            data = {"documents": len(fresh), "contexts": len(texts), "written": self.store.writes - before}
            dispatch_custom_event(EVENT, data, config={"callbacks": callbacks})
        done = {
            id(document): self._compressed(document, pieces, [next(references) for _ in pieces])
            for document, pieces in zip(fresh, parts, strict=True)
        }
        return [done.get(id(document), document) for document in documents]

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """The same, as a transformer.

        Args:
            documents (`Sequence[Document]`): as for `compress_documents`.
            kwargs: play no part.
        """
        return self.compress_documents(documents, "")

    def _compressed(self, document: Document, pieces: list[str], references: list[str]) -> Document:
        if self.fallback == "text":
            unknown = [i for i, reference in enumerate(references) if reference not in self._fidelity]
            if unknown:
                states = MemoryState.stack([self.store.get(references[i]) for i in unknown])
                found = self.pipeline.fidelity([pieces[i] for i in unknown], states).greedy.tolist()
                self._fidelity.update({references[i]: value for i, value in zip(unknown, found, strict=True)})
            if min(self._fidelity[reference] for reference in references) < self.min_fidelity:
                return document
        return Document(
            id=document.id,
            page_content=" ".join(marker(reference) for reference in references),
            metadata=document.metadata | {KEY: references},
        )
