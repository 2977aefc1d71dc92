"""A wrapper for retrievers whose documents then carry the memory of their text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from pydantic import ConfigDict, Field

from .document_compressors import GradMemCompressor

if TYPE_CHECKING:
    from .chat_models import ChatGradMem


class GradMemRetriever(BaseRetriever):
    """Writes what another retriever finds into memory.

    Args:
        base_retriever (`Runnable[str, list[Document]]`): finds the documents: a retriever, or any Runnable that returns
            documents for a query.
        base_compressor (`GradMemCompressor`): writes them.
        k (`int`, *optional*): the most documents to return; None: all that are found.
    """

    base_retriever: RetrieverLike
    base_compressor: GradMemCompressor
    k: int | None = Field(default=None, ge=1)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @classmethod
    def from_retriever(
        cls, retriever: RetrieverLike, chat: ChatGradMem, *, k: int | None = None, **options: Any
    ) -> Self:
        """A retriever that writes with a chat model's pipeline into its store.

        Args:
            retriever (`Runnable[str, list[Document]]`): finds the documents.
            chat (`ChatGradMem`): the model that is to read them.
            k (`int`, *optional*): the most documents to return.
            options: fields of `GradMemCompressor`.
        """
        return cls(base_retriever=retriever, base_compressor=GradMemCompressor.from_chat(chat, **options), k=k)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        child, most = run_manager.get_child(), self._most(k)
        documents = self.base_retriever.invoke(query, config={"callbacks": child}, **kwargs)
        return self.base_compressor.compress_documents(documents[:most], query, callbacks=child)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None, **kwargs: Any
    ) -> list[Document]:
        child, most = run_manager.get_child(), self._most(k)
        documents = await self.base_retriever.ainvoke(query, config={"callbacks": child}, **kwargs)
        return list(await self.base_compressor.acompress_documents(documents[:most], query, callbacks=child))

    def _most(self, k: int | None) -> int | None:
        """The most documents to return: a call's `k`, or the retriever's."""
        if k is not None and (not isinstance(k, int) or k < 1):
            raise ValueError(f"k must be an integer of at least 1, got {k!r}. Leave it out for the retriever's own k.")
        return self.k if k is None else k
