"""Any retriever, with documents that are memory states."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from .document_compressors import GradMemCompressor


class GradMemRetriever(BaseRetriever):
    """What another retriever finds, written into memory.

    Args:
        retriever (`BaseRetriever`): who finds the documents.
        compressor (`GradMemCompressor`): who writes them.
        k (`int`, *optional*): the most documents to return; None: all that are found.
    """

    retriever: BaseRetriever
    compressor: GradMemCompressor
    k: int | None = Field(default=None, ge=1)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        child = run_manager.get_child()
        documents = self.retriever.invoke(query, config={"callbacks": child}, **kwargs)
        limit = self.k if k is None else k
        return self.compressor.compress_documents(documents[:limit], query, callbacks=child)
