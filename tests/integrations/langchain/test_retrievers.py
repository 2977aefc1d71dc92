"""Retrieved documents as memory, in a chain."""

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gradmem import ChatGradMem, GradMemCompressor, GradMemRetriever, attach_documents
from tiny import tiny_text

TEXTS = [tiny_text(12, seed=i) for i in range(4)]


class Words(DeterministicFakeEmbedding):
    """Places that depend on the text alone."""


def test_retrieval_chain_writes_once_and_saves_tokens(pipeline):
    vectors = InMemoryVectorStore(Words(size=8))
    vectors.add_texts(TEXTS, metadatas=[{"page": i} for i in range(4)])
    compressor = GradMemCompressor(pipeline=pipeline)
    retriever = GradMemRetriever(retriever=vectors.as_retriever(search_kwargs={"k": 4}), compressor=compressor)
    chat = ChatGradMem(pipeline=pipeline, store=compressor.store, max_tokens=4)
    prompt = ChatPromptTemplate.from_messages([("human", "{documents} Question : {question}")])
    events = []

    class Handler(BaseCallbackHandler):
        def on_custom_event(self, name, data, **kwargs):
            events.append((name, data))

    def ask(question, retriever):
        documents = retriever.invoke(question, {"callbacks": [Handler()]})
        messages = prompt.format_messages(
            documents=" ".join(document.page_content for document in documents), question=question
        )
        return chat.invoke(attach_documents(messages, documents))

    with_memory = [ask(question, retriever).usage_metadata["input_tokens"] for question in ("w1", "w2")]
    as_text = ask("w1", retriever.retriever).usage_metadata["input_tokens"]
    assert compressor.store.writes == 4
    assert [data["written"] for name, data in events if name == "gradmem_write"] == [4, 0]
    assert with_memory[0] == with_memory[1] == as_text - 4 * 12 + 4 * 3
