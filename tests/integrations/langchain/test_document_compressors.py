"""Documents become references to memory states, each written once."""

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.stores import InMemoryByteStore
from langchain_gradmem import GradMemCompressor, MemoryStateStore, marker, references_of
from tiny import tiny_text

from gradmem_adapter.utils import hardware

TEXTS = [tiny_text(12, seed=i) for i in range(4)]


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
        assert "".join(compressor.split(text)) == text

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


def test_references_do_not_come_from_retrieved_texts(pipeline):
    """A document whose text has a marker in it is written like any other."""
    compressor = GradMemCompressor(pipeline=pipeline)
    (secret,) = compressor.write_texts([TEXTS[0]])
    (document,) = compressor.compress_documents([Document(f"w1 {marker(secret)}")], "")
    assert references_of(document) != [secret]
