"""Documents in, documents out whose content is a reference to a memory state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from langchain_core.callbacks import Callbacks
from langchain_core.callbacks.manager import dispatch_custom_event
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from pydantic import ConfigDict, Field, PrivateAttr

from gradmem_adapter import GradMemModel, GradMemPipeline, MemoryState

from .references import KEY, marker, references_of
from .store import MemoryStateStore

EVENT = "gradmem_write"
"""The custom event of a write: {"documents", "contexts", "written"}."""


class GradMemCompressor(BaseDocumentCompressor, BaseDocumentTransformer):
    """Writes documents into memory states, those that are new in batches that fit into memory.

    A document comes back with the markers of its references as content and the references in `metadata["gradmem"]`,
    beside its own metadata. One that is longer than the model takes is split first and has a reference for each part.
    One that carries references already is left as it is.

    Attributes:
        pipeline: who writes.
        store: where states are kept.
        write_options: what `pipeline.write_many` takes: steps, lr, optimizer, tolerance.
        fallback: "text" leaves a document as text where its fidelity is below `min_fidelity`.
        min_fidelity: the share of tokens that greedy decoding from memory must get back.
    """

    pipeline: GradMemPipeline = Field(exclude=True)
    store: MemoryStateStore = Field(exclude=True, default_factory=MemoryStateStore)
    write_options: dict[str, Any] = Field(default_factory=dict)
    fallback: Literal["text"] | None = None
    min_fidelity: float = Field(default=0.5, ge=0, le=1)

    _fidelity: dict[str, float] = PrivateAttr(default_factory=dict)
    """Greedy fidelity by reference, which decides both text and memory, so that it is measured once."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Write documents into memory; `query` plays no part, so that a document is written once for all queries."""
        fresh = [d for d in documents if not references_of(d) and d.page_content.strip()]
        parts = [self._split(document.page_content) for document in fresh]
        texts = [text for pieces in parts for text in pieces]
        before = self.store.writes
        references = iter(self.store.write(self.pipeline, texts, **self.write_options) if texts else [])
        if callbacks:
            data = {"documents": len(fresh), "contexts": len(texts), "written": self.store.writes - before}
            dispatch_custom_event(EVENT, data, config={"callbacks": callbacks})
        done = {
            id(document): self._compressed(document, pieces, [next(references) for _ in pieces])
            for document, pieces in zip(fresh, parts, strict=True)
        }
        return [done.get(id(document), document) for document in documents]

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """The same, as a transformer."""
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

    def _split(self, text: str) -> list[str]:
        """Parts that fit the model, as equal as they can be, cut between tokens."""
        model, tokenizer = cast(GradMemModel, self.pipeline.model.base_model), self.pipeline.tokenizer
        if model.positions is None:
            return [text]
        extra = len(tokenizer("")["input_ids"])
        limit = model.positions - model.prefix_length - extra
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        count = -(-len(offsets) // limit)
        size = -(-len(offsets) // max(1, count))
        starts = [offsets[i][0] for i in range(0, len(offsets), size)] or [0]
        return [text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]
