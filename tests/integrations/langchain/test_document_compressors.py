"""Documents become references to memory states, each written once."""

import itertools
import uuid
from pathlib import Path

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from langchain_gradmem import GradMemCompressor, MemoryStateStore, marker, references_of
from peft import LoraConfig
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStore
from gradmem_adapter.utils import hardware

TEXTS = [tiny_text(12, seed=i) for i in range(4)]


class Failing(MemoryStore):
    def put(self, states, entries, **how):
        raise OSError("disk full")


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.all = []

    def on_chain_start(self, *args, run_id, parent_run_id, **kwargs):
        assert parent_run_id is None
        self.all.append(run_id)

    def on_custom_event(self, name, data, *, run_id, **kwargs):
        assert name == "gradmem_write"
        self.all.append((run_id, data))

    def on_chain_end(self, *args, run_id, **kwargs):
        self.all.append(run_id)

    def take(self):
        found, self.all = self.all, []
        return found


class TestCompressor:
    def test_documents_keep_their_text_and_get_references(self, pipeline):
        """Embeddings, rerankers and citations need the text; databases refuse lists in metadata."""
        compressor = GradMemCompressor(pipeline=pipeline)
        documents = [Document(text, id=str(i), metadata={"page": i}) for i, text in enumerate(TEXTS)]
        compressed = compressor.compress_documents(documents, "w1")
        assert compressor.store.writes == 4
        for before, after in zip(documents, compressed, strict=True):
            (reference,) = references_of(after)
            assert (after.page_content, after.id) == (before.page_content, before.id)
            assert after.metadata == {"page": before.metadata["page"], "gradmem": reference}
            assert compressor.store.get(reference) is not None
            assert "gradmem" not in before.metadata, "the original was changed"
        assert compressor.transform_documents(documents) == compressed
        assert compressor.transform_documents(iter(documents)) == compressed  # as `lazy_load` gives them
        assert list(compressor.compress_documents(compressed, "w2")) == compressed
        assert compressor.store.writes == 4

    @pytest.mark.parametrize("given", [lambda heard: [heard], lambda heard: CallbackManager.configure([heard])])
    async def test_callbacks_outside_a_run_get_events_too(self, pipeline, given):
        """Of a separate run, as with LangChain's own components."""
        compressor = GradMemCompressor(pipeline=pipeline)
        heard = Heard()
        for written in (1, 0):
            (document,) = compressor.compress_documents([Document("w1 w2")], "q", callbacks=given(heard))
            assert references_of(document)
            run, told, ended = heard.take()
            assert told == (run, {"documents": 1, "contexts": 1, "written": written})
            assert ended == run
        (again,) = await compressor.acompress_documents([Document("w1 w2")], "q", callbacks=given(heard))
        assert again == document
        assert heard.take()[1][1]["written"] == 0

    def test_inside_a_run_events_belong_to_that_run(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline)
        heard = Heard()
        RunnableLambda(compressor.transform_documents).invoke([Document("w1 w2")], {"callbacks": [heard]})
        run, told, ended = heard.take()
        assert (told[0], told[1]["written"], ended) == (run, 1, run)
        compressor.transform_documents([Document("w1 w2")])  # there is no callback
        assert heard.take() == []

    def test_a_source_that_is_not_valid_unicode_is_accepted(self, pipeline):
        """As loaders give it for a file that was named on another system."""
        compressor = GradMemCompressor(pipeline=pipeline)
        (document,) = compressor.compress_documents([Document(TEXTS[0], metadata={"source": "caf\udce9.txt"})], "")
        assert document.metadata["source"] == "caf\udce9.txt"
        assert [entry.source for entry in compressor.store.store.entries()] == ["caf\N{REPLACEMENT CHARACTER}.txt"]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (Document("w1"), "got a Document without a list around it"),
            ("w1", "got a str without a list around it"),
            ([Document("w1"), "w2"], r"number 1 is a str\. Wrap a text as Document"),
        ],
    )
    def test_what_is_no_list_of_documents_is_refused(self, pipeline, wrong, message):
        with pytest.raises(TypeError, match=message):
            GradMemCompressor(pipeline=pipeline).transform_documents(wrong)

    @pytest.mark.parametrize("source", [Path("a/b.txt"), uuid.UUID(int=7), 7])
    def test_sources_that_are_no_texts_are_stored_as_texts(self, pipeline, source):
        compressor = GradMemCompressor(pipeline=pipeline)
        (document,) = compressor.compress_documents([Document(TEXTS[0], metadata={"source": source})], "")
        assert document.metadata["source"] == source
        assert compressor.store.store.forget(str(source)) == 1

    def test_states_of_an_edited_or_deleted_document_can_be_forgotten_by_source(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline)
        documents = [Document(text, metadata={"source": name}) for text, name in zip(TEXTS, "aab", strict=False)]
        _, new, other = compressor.transform_documents(documents)
        assert compressor.store.store.forget("a") == 2
        assert list(compressor.store.yield_keys()) == references_of(other)
        assert compressor.transform_documents([documents[1]]) == [new], "the edited one is written again"
        assert compressor.store.gc(references_of(new)) == 1

    @pytest.mark.parametrize("foreign", ["yes", 3, None, ["a" * 32], "a" * 32, f"{'a' * 32} {'b' * 32}"])
    def test_references_in_metadata_are_never_trusted(self, pipeline, foreign):
        """A loader may fill any field, even with someone else's reference."""
        compressor = GradMemCompressor(pipeline=pipeline)
        (document,) = compressor.compress_documents([Document(TEXTS[0], metadata={"gradmem": foreign})], "")
        assert references_of(document) == compressor.write_texts(TEXTS[0])
        (empty,) = compressor.compress_documents([Document(" ", metadata={"gradmem": foreign})], "")
        assert references_of(empty) == []

    def test_a_chunk_of_a_written_document_is_written_separately(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline)
        (whole,) = compressor.compress_documents([Document(TEXTS[0])], "")
        chunk = Document(TEXTS[0][:12], metadata=whole.metadata)
        assert references_of(compressor.compress_documents([chunk], "")[0]) == compressor.write_texts(
            TEXTS[0][:12].strip()
        )

    def test_a_damaged_state_is_written_again(self, pipeline, tmp_path):
        store = MemoryStateStore(MemoryStore(tmp_path, dtype="float32"))
        compressor = GradMemCompressor(pipeline=pipeline, store=store)
        written = compressor.compress_documents([Document(TEXTS[0])], "")
        (file,) = compressor.store.store.path.rglob("*.safetensors")
        file.write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="is written again"):
            assert compressor.compress_documents(written, "") == written
        assert compressor.store.get(*references_of(written[0])) == pipeline.write(TEXTS[0]).cpu()

    def test_long_documents_are_split_and_nothing_is_lost(self, pipeline):
        compressor = GradMemCompressor(pipeline=pipeline)
        text = tiny_text(400)
        (document,) = compressor.compress_documents([Document(text)], "")
        references = references_of(document)
        assert len(references) == 3  # of 160 positions, 3 are for the memory
        tokens = sum(int(compressor.store.get(r).context_tokens[0]) for r in references)
        places = [(text.index(part), text.index(part) + len(part)) for part in compressor.split(text)]
        assert tokens > 400, "a part repeats the end of the one before"
        assert (places[0][0], places[-1][1]) == (0, len(text))
        assert all(after[0] < before[1] for before, after in itertools.pairwise(places))

    def test_a_document_that_the_store_has_is_not_written_again(self, pipeline):
        """Segments once overlapped in the store and not here, so that most of a document was written twice."""
        text, compressor = tiny_text(70, seed=5), GradMemCompressor(pipeline=pipeline)
        references = compressor.store.write_document(pipeline, text, segment_tokens=32)
        compressor.part_tokens = 32
        assert references_of(compressor.compress_documents([Document(text)], "")[0]) == references
        assert compressor.store.writes == len(references) > 1

    def test_fallback_keeps_the_texts_that_memory_does_not_hold(self, pipeline, monkeypatch):
        """By the loss with memory and without: nothing is decoded, and each text is measured once."""
        monkeypatch.setattr(pipeline.model.base_model, "reconstruct", None)
        document, passes = Document(TEXTS[0], metadata={"page": 1}), []
        hook = pipeline.model.get_base_model().register_forward_hook(lambda *of: passes.append(of))
        little = GradMemCompressor(pipeline=pipeline, fallback="text")
        much = GradMemCompressor(
            pipeline=pipeline,
            fallback="text",
            min_gain=0.05,
            write_options={"steps": 60, "lr": 0.1, "optimizer": "adam"},
        )
        assert little.compress_documents([document], "w1") == little.compress_documents([document], "w2") == [document]
        assert references_of(much.compress_documents([document], "")[0])
        hook.remove()
        assert len(passes) == 2

    def test_fallback_compares_with_the_backbone_that_would_read_the_text(self):
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        with_lora = tiny_pipeline(lora_config=lora)
        compressor = GradMemCompressor(pipeline=with_lora, fallback="text")
        (reference,) = compressor.write_texts([TEXTS[0]], None)
        ids, _ = with_lora.encode_contexts(TEXTS[0])
        with with_lora.model.disable_adapter(), torch.no_grad():
            without = with_lora.model(input_ids=ids, labels=ids).loss.item()
        written = compressor.store.get(reference).write_losses[0, -1].item()
        assert compressor._gain(TEXTS[0], reference) == pytest.approx(1 - written / without, rel=1e-4)

    def test_a_document_whose_text_is_a_file_name_is_written(self, pipeline, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "w1").touch()
        (written,) = GradMemCompressor(pipeline=pipeline).compress_documents([Document("w1")], "")
        assert references_of(written)

    def test_empty_documents_are_left_unchanged(self, pipeline):
        documents = [Document(" "), Document(TEXTS[0])]
        empty, written = GradMemCompressor(pipeline=pipeline).compress_documents(documents, "")
        assert empty == documents[0]
        assert references_of(written)

    def test_many_documents_are_written_in_batches(self, pipeline, monkeypatch, capsys):
        write, sizes = pipeline.model.base_model._write, []
        monkeypatch.setitem(hardware.SATURATED, "cpu", 100)
        monkeypatch.setattr(
            pipeline.model.base_model,
            "_write",
            lambda context, *options, **kwargs: (
                sizes.append(context.input_ids.numel()) or write(context, *options, **kwargs)
            ),
        )
        lengths = [3 + i % 40 for i in range(50)]
        compressor = GradMemCompressor(pipeline=pipeline)
        documents = compressor.compress_documents([Document(tiny_text(n, seed=i)) for i, n in enumerate(lengths)], "")
        assert max(sizes) <= 100 < sum(sizes)
        found = [compressor.store.get(*references_of(document)).context_tokens.item() for document in documents]
        assert found == lengths
        assert capsys.readouterr() == ("", "")

    def test_states_written_before_a_failure_are_kept(self, pipeline, monkeypatch):
        write, done = pipeline.model.base_model._write, []

        def fail(ids, *rest, **options):
            if len(done) == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            done.append(ids)
            return write(ids, *rest, **options)

        compressor = GradMemCompressor(pipeline=pipeline)
        with monkeypatch.context() as patch:
            patch.setitem(hardware.SATURATED, "cpu", 1)
            patch.setattr(pipeline.model.base_model, "_write", fail)
            with pytest.raises(torch.cuda.OutOfMemoryError, match="Context 2 with 12 tokens does not fit"):
                compressor.compress_documents([Document(text) for text in TEXTS], "")
        assert len(list(compressor.store.yield_keys())) == compressor.store.writes == 2
        compressor.compress_documents([Document(text) for text in TEXTS], "")
        assert compressor.store.writes == 4

    def test_a_store_that_fails_raises(self, pipeline, tmp_path):
        compressor = GradMemCompressor(pipeline=pipeline, store=MemoryStateStore(Failing(tmp_path)))
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
