"""Store, compressor and retriever."""

import pytest
import torch
from conftest import tiny_pipeline
from langchain_classic.storage import LocalFileStore
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.stores import InMemoryByteStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gradmem import (
    ChatGradMem,
    GradMemCompressor,
    GradMemRetriever,
    MemoryStateStore,
    attach_documents,
    marker,
    references_of,
)
from tiny import tiny_text

from gradmem_adapter import MemoryStateError
from gradmem_adapter.utils import hardware

TEXTS = [tiny_text(12, seed=i) for i in range(4)]


class TestStore:
    def test_the_same_text_is_written_once(self, pipeline):
        store = MemoryStateStore()
        first = store.write(pipeline, [TEXTS[0], TEXTS[1], TEXTS[0]])
        assert first[0] == first[2] != first[1]
        assert store.writes == 2
        assert store.write(pipeline, [TEXTS[1], TEXTS[2]])[0] == first[1]
        assert store.writes == 3

    def test_options_and_model_are_part_of_the_identity(self, pipeline):
        store = MemoryStateStore()
        references = {
            store.write(pipeline, TEXTS[:1])[0],
            store.write(pipeline, TEXTS[:1], steps=3)[0],
            store.write(tiny_pipeline(seed=4), TEXTS[:1])[0],
        }
        assert len(references) == 3

    def test_what_is_stored_is_what_write_gives(self, pipeline):
        store = MemoryStateStore()
        (reference,) = store.write(pipeline, TEXTS[:1])
        assert store.get(reference) == pipeline.write(TEXTS[0]).cpu()

    def test_a_directory_outlives_the_store(self, pipeline, tmp_path):
        (reference,) = MemoryStateStore(LocalFileStore(tmp_path)).write(pipeline, TEXTS[:1])
        again = MemoryStateStore(LocalFileStore(tmp_path))
        assert again.write(pipeline, TEXTS[:1]) == [reference]
        assert again.writes == 0

    def test_damaged_states_raise(self, pipeline):
        store = MemoryStateStore()
        (reference,) = store.write(pipeline, TEXTS[:1])
        (key,) = store.store.yield_keys()
        store.store.mset([(key, store.store.mget([key])[0][:-7])])
        with pytest.raises(MemoryStateError, match=f"'{reference}' cannot be read"):
            store.get(reference)

    @pytest.mark.parametrize("namespace", ["", "a/b", "../x", "a b"])
    def test_namespaces_that_could_reach_another_are_refused(self, namespace):
        with pytest.raises(ValueError, match="namespace"):
            MemoryStateStore(namespace=namespace)

    def test_a_text_that_cannot_be_written_stores_nothing(self, pipeline):
        store = MemoryStateStore()
        with pytest.raises(ValueError, match="tokens"):
            store.write(pipeline, [TEXTS[0], tiny_text(500)])
        assert list(store.yield_keys()) == []


class Failing(InMemoryByteStore):
    def mset(self, key_value_pairs):
        raise OSError("disk full")


class TestCompressor:
    def test_documents_become_references(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline)
        documents = [Document(text, id=str(i), metadata={"page": i}) for i, text in enumerate(TEXTS)]
        compressed = compressor.compress_documents(documents, "w1")
        assert compressor.store.writes == 4
        for before, after in zip(documents, compressed, strict=True):
            (reference,) = references_of(after)
            assert after.page_content == marker(reference)
            assert after.metadata["page"] == before.metadata["page"]
            assert after.id == before.id
            assert compressor.store.get(reference) is not None
            assert "gradmem" not in before.metadata, "the original was changed"
        assert compressor.transform_documents(documents) == compressed
        assert list(compressor.compress_documents(compressed, "w2")) == compressed
        assert compressor.store.writes == 4

    def test_long_documents_are_split_and_nothing_is_lost(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline)
        text = tiny_text(400)
        (document,) = compressor.compress_documents([Document(text)], "")
        references = references_of(document)
        assert len(references) == 3  # of 160 positions, 3 are for the memory
        tokens = sum(int(compressor.store.get(r).context_tokens[0]) for r in references)
        assert tokens == 400
        assert "".join(compressor._split(text)) == text

    def test_fallback_keeps_the_text_of_what_memory_does_not_hold(self, pipeline):
        strict = GradMemCompressor(pipeline=pipeline, fallback="text", min_fidelity=1.0)
        lenient = GradMemCompressor(pipeline=pipeline, fallback="text", min_fidelity=0.0)
        document = Document(TEXTS[0], metadata={"page": 1})
        assert strict.compress_documents([document], "") == [document]
        assert references_of(lenient.compress_documents([document], "")[0])

    def test_fidelity_is_measured_once_for_all_queries(self, pipeline, monkeypatch):
        calls = []
        fidelity = pipeline.fidelity
        monkeypatch.setattr(pipeline, "fidelity", lambda texts, memory: calls.append(texts) or fidelity(texts, memory))
        compressor = GradMemCompressor(pipeline=pipeline, fallback="text", min_fidelity=1.0)
        document = Document(TEXTS[0])
        assert compressor.compress_documents([document], "w1") == compressor.compress_documents([document], "w2")
        assert calls == [[TEXTS[0]]]

    def test_empty_documents_stay(self, pipeline):
        documents = [Document(" "), Document(TEXTS[0])]
        empty, written = GradMemCompressor(pipeline=pipeline).compress_documents(documents, "")
        assert empty == documents[0]
        assert references_of(written)

    def test_many_documents_are_written_in_batches(self, pipeline, monkeypatch, capsys):
        write, sizes = pipeline.model.base_model.write, []
        monkeypatch.setattr(hardware, "SATURATED", {"cpu": 100})
        monkeypatch.setattr(
            pipeline.model.base_model,
            "write",
            lambda ids, *rest, **kw: sizes.append(ids.numel()) or write(ids, *rest, **kw),
        )
        lengths = [3 + i % 40 for i in range(50)]
        compressor = GradMemCompressor(pipeline=pipeline)
        documents = compressor.compress_documents([Document(tiny_text(n, seed=i)) for i, n in enumerate(lengths)], "")
        assert max(sizes) <= 100 < sum(sizes)
        found = [compressor.store.get(*references_of(document)).context_tokens.item() for document in documents]
        assert found == lengths
        assert capsys.readouterr() == ("", "")

    def test_out_of_memory_stores_nothing(self, pipeline, monkeypatch):
        write, done = pipeline.model.base_model.write, []

        def fail(ids, *rest, **options):
            if done:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            done.append(ids)
            return write(ids, *rest, **options)

        monkeypatch.setattr(hardware, "SATURATED", {"cpu": 1})
        monkeypatch.setattr(pipeline.model.base_model, "write", fail)
        compressor = GradMemCompressor(pipeline=pipeline)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="Context 1 with 12 tokens does not fit"):
            compressor.compress_documents([Document(text) for text in TEXTS], "")
        assert len(done) == 1
        assert compressor.store.writes == 0
        assert list(compressor.store.yield_keys()) == []

    def test_a_store_that_fails_raises(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline, store=MemoryStateStore(Failing()))
        with pytest.raises(OSError, match="disk full"):
            compressor.compress_documents([Document(TEXTS[0])], "")
        assert compressor.store.writes == 0
        assert list(compressor.store.yield_keys()) == []


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


def test_references_do_not_come_from_retrieved_texts(pipeline):
    """A document whose text has a marker in it is written like any other."""
    compressor = GradMemCompressor(pipeline=pipeline)
    (secret,) = compressor.store.write(pipeline, [TEXTS[0]])
    (document,) = compressor.compress_documents([Document(f"w1 {marker(secret)}")], "")
    assert references_of(document) != [secret]
