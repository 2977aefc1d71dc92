"""Documents of any retriever, written into memory."""

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gradmem import GradMemRetriever, references_of
from tiny import tiny_text

TEXTS = [tiny_text(12, seed=i) for i in range(4)]


class Words(DeterministicFakeEmbedding):
    """Embeddings that depend only on the text."""


def test_documents_are_written_once_and_events_say_so(chat):
    vectors = InMemoryVectorStore(Words(size=8))
    vectors.add_texts(TEXTS, metadatas=[{"page": i} for i in range(4)])
    retriever = GradMemRetriever.from_retriever(vectors.as_retriever(search_kwargs={"k": 4}), chat, k=3)
    events = []

    class Handler(BaseCallbackHandler):
        def on_custom_event(self, name, data, **kwargs):
            events.append((name, data))

    for question in ("w1", "w2"):
        found = retriever.invoke(question, {"callbacks": [Handler()]})
        assert len(found) == 3
        assert all(document.page_content in TEXTS for document in found)
        assert all(chat.store.get(*references_of(document)) for document in found)
    assert [name for name, _ in events] == ["gradmem_write"] * 2
    assert chat.store.writes == sum(data["written"] for _, data in events) <= 4


def test_written_documents_can_be_embedded_and_found_again(chat):
    """Their text is unchanged, so the same embedding finds them."""
    vectors = InMemoryVectorStore(Words(size=8))
    written = GradMemRetriever.from_retriever(RunnableLambda(lambda _: list(map(Document, TEXTS))), chat).invoke("")
    vectors.add_documents(written)
    (found,) = vectors.similarity_search(TEXTS[2], k=1)
    assert found.page_content == TEXTS[2]
    assert references_of(found) == references_of(written[2])


async def test_an_async_retriever_is_awaited(chat):
    async def search(query):
        return [Document(f"{query} w2")]

    def never(query):
        raise AssertionError("called in a thread")

    retriever = GradMemRetriever.from_retriever(RunnableLambda(never, search), chat)
    (document,) = await retriever.ainvoke("w1")
    assert references_of(document) == chat.store.write(chat.pipeline, "w1 w2")


async def test_k_of_a_call_is_checked_before_the_search(chat):
    asked = []
    retriever = GradMemRetriever.from_retriever(RunnableLambda(asked.append), chat)
    for wrong in (0, -1, "2"):
        with pytest.raises(ValueError, match=f"k must be an integer of at least 1, got {wrong!r}"):
            retriever.invoke("w1", k=wrong)
        with pytest.raises(ValueError, match="k must be an integer"):
            await retriever.ainvoke("w1", k=wrong)
    assert asked == []
