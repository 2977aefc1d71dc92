"""Write documents into memory, and return them with references to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from langchain_core.callbacks import Callbacks
from langchain_core.callbacks.manager import dispatch_custom_event
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.runnables.config import ensure_config, get_callback_manager_for_config
from pydantic import Field, PrivateAttr

from gradmem_adapter.lora import without_lora
from gradmem_adapter.utils.files import readable

from .references import with_references
from .writer import MemoryWriter

EVENT = "gradmem_write"
"""The name of the custom event of a write; its data are {"documents", "contexts", "written"}."""


class GradMemCompressor(MemoryWriter, BaseDocumentCompressor, BaseDocumentTransformer):
    """Writes documents into memory states; new ones are written in batches that fit into memory.

    A document is returned with its text, so that embeddings, rerankers and citations work as before, and with its
    references as one string in `metadata["gradmem"]`. References are found from the text, never taken from metadata:
    what a loader left there is replaced, and a text is written again if it changed or its state was lost or damaged. A
    text longer than the adapter was trained for is split, with a reference for each part.

    Args:
        pipeline (`GradMemPipeline`): what writes.
        store (`MemoryStateStore`, *optional*, defaults to a temporary one): where states are kept.
        write_options (`WriteOptions` or its fields as a `dict`, *optional*): how to write.
        part_tokens (`int`, *optional*): the most tokens in a part; None: as for `pipeline.segments`.
        progress (`bool`, *optional*, defaults to `False`): show a progress bar of writes; None: if stderr is a
            terminal.
        fallback (`str`, *optional*): `"text"` leaves a document without references if memory holds too little of it.
        min_gain (`float`, *optional*, defaults to `0.5`): with `fallback`, the share of a text's loss per token that
            memory must remove. WRITE has measured the loss with memory; the loss without takes one pass.
    """

    fallback: Literal["text"] | None = None
    min_gain: float = Field(default=0.5, ge=0, lt=1)

    _gains: dict[str, float] = PrivateAttr(default_factory=dict)
    """The gain of each reference, so that it is measured only once."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Write documents into memory.

        Args:
            documents (`Sequence[Document]`): documents, of which empty ones are not written. The output of a loader's
                `lazy_load` is also accepted.
            query (`str`): ignored, so that a document is written once for all queries.
            callbacks (`Callbacks`, *optional*): receive the custom event `"gradmem_write"` with what was written.
                Handlers outside of a run receive it in a run of the compressor's own. None: those of the enclosing run.

        Returns:
            `list[Document]`: new documents, in order; the given ones are left unchanged.

        Raises:
            TypeError: the documents are not `Document`s, or one was given without a list around it.
        """
        if isinstance(documents, str | Document):
            raise TypeError(f"Expected a list of Documents, got a {type(documents).__name__} without a list around it.")
        documents = list(documents)  # a loader may yield them one by one
        for i, document in enumerate(documents):
            if not isinstance(document, Document):
                raise TypeError(
                    f"Expected a list of Documents, but number {i} is a {type(document).__name__}. Wrap a text as "
                    "Document(text)."
                )
        config = ensure_config({"callbacks": callbacks} if callbacks else None)
        if callbacks and get_callback_manager_for_config(config).parent_run_id is None:
            return RunnableLambda(self._compress, name=type(self).__name__).invoke(documents, config)
        return self._compress(documents, config)

    def _compress(self, documents: list[Document], config: RunnableConfig) -> list[Document]:
        parts = [
            self.split(document.page_content, f"Document {i} (id {document.id})")
            if document.page_content.strip()
            else []
            for i, document in enumerate(documents)
        ]
        texts = [text for pieces in parts for text in pieces]
        before = self.store.writes
        named = [document.metadata.get("source") for document in documents]
        sources = [
            None if source is None else readable(str(source))  # loaders also set paths, URLs and numbers
            for source, pieces in zip(named, parts, strict=True)
            for _ in pieces
        ]
        references = iter(self.write_texts(texts, sources) if texts else [])
        if get_callback_manager_for_config(config).parent_run_id is not None:  # events need a run
            data = {"documents": len(documents), "contexts": len(texts), "written": self.store.writes - before}
            dispatch_custom_event(EVENT, data, config=config)
        result = []
        for document, pieces in zip(documents, parts, strict=True):
            found = [next(references) for _ in pieces]
            result.append(with_references(document, found if self._holds(pieces, found) else []))
        return result

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """The same, as a transformer.

        Args:
            documents (`Sequence[Document]`): as for `compress_documents`.
            kwargs: ignored.
        """
        return self.compress_documents(documents, "")

    def _holds(self, pieces: list[str], references: list[str]) -> bool:
        """Whether memory holds enough of each part."""
        if self.fallback is None:
            return True
        for piece, reference in zip(pieces, references, strict=True):
            if reference not in self._gains:
                self._gains[reference] = self._gain(piece, reference)
        return all(self._gains[reference] >= self.min_gain for reference in references)

    def _gain(self, text: str, reference: str) -> float:
        """The share of the text's loss per token that its memory removes."""
        losses = self.store.get(reference).write_losses[0]
        ids, mask = self.pipeline.encode_contexts(text)
        if ids.shape[1] < 2:
            return 1.0  # too short to have a loss of its own
        backbone = without_lora(self.pipeline.model.get_base_model())  # the model that would read the text itself
        with torch.no_grad():
            without = backbone(input_ids=ids, attention_mask=mask, labels=ids).loss.item()
        return 1 - losses[~losses.isnan()][-1].item() / without
