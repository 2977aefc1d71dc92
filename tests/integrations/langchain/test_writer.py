"""MemoryWriter: texts that do not fit are split, and lines that fit are joined."""

import pytest
from langchain_core.documents import Document
from langchain_gradmem import GradMemCompressor, MemoryWriter, TurnMemory
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import WriteOptions

TEXTS = [tiny_text(12, seed=i) for i in range(4)]


@pytest.fixture
def writer(pipeline):
    return MemoryWriter(pipeline=pipeline)


@pytest.mark.parametrize("options", [WriteOptions(steps=3), {"steps": 3}])
def test_the_options_reach_the_store(writer, options):
    other = MemoryWriter(pipeline=writer.pipeline, store=writer.store, write_options=options)
    assert other.write_options == WriteOptions(steps=3)
    (reference,) = other.write_texts(TEXTS[:1])
    assert reference != writer.write_texts(TEXTS[:1])[0]
    assert reference == writer.store.reference(writer.pipeline, TEXTS[0], WriteOptions(steps=3))
    assert writer.store.get(reference).write_losses.shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stesp": 3}, TypeError, "stesp"),
        ({"steps": -1}, ValueError, "steps must be a non-negative integer"),
        (3, ValueError, "WriteOptions"),
    ],
)
def test_invalid_options_are_refused_on_construction(pipeline, options, error, message):
    for kind in (MemoryWriter, TurnMemory, GradMemCompressor):
        with pytest.raises(error, match=message):
            kind(pipeline=pipeline, write_options=options)


def test_a_text_is_split_into_equal_parts_that_fit(writer):
    text = tiny_text(400)
    parts = writer.split(text, overlap=0)
    assert " ".join(parts) == text
    assert [len(part.split()) for part in parts] == [134, 133, 133]  # of 160 positions, 3 are for the memory
    assert writer.split(TEXTS[0]) == TEXTS[:1]


def test_lines_are_joined_as_long_as_they_fit(writer):
    lines = [tiny_text(60, seed=i) for i in range(5)]
    assert writer.join(lines) == ["\n".join(lines[:2]), "\n".join(lines[2:4]), lines[4]]


def test_parts_have_the_adapters_segment_length():
    """Not its trained length or the backbone's limit: memory would keep longer parts worse."""
    trained = MemoryWriter(pipeline=tiny_pipeline(num_memory_tokens=25, trained_length=50))
    small = MemoryWriter(pipeline=tiny_pipeline(num_memory_tokens=6, trained_length=50))
    assert [len(part.split()) for part in small.split(tiny_text(24), overlap=0)] == [12, 12]
    assert [len(part.split()) for part in trained.split(tiny_text(120), overlap=0)] == [50, 35, 35]
    assert [len(part.split()) for part in trained.join([tiny_text(120)])] == [50, 35, 35]
    chosen = MemoryWriter(pipeline=trained.pipeline, part_tokens=30)
    assert [len(part.split()) for part in chosen.split(tiny_text(90), overlap=0)] == [30, 30, 30]


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda w, text: w.split(text), "The text"),
        (lambda w, text: w.join(["w1 w2", text]), "Line 1"),
        (lambda w, text: w.write_texts(["w1 w2", text]), "Context 1"),
        (
            lambda w, text: GradMemCompressor(pipeline=w.pipeline).compress_documents(
                [Document("w1"), Document(text, id="page-7")], ""
            ),
            r"Document 1 \(id page-7\)",
        ),
    ],
)
@pytest.mark.parametrize(("wrong", "what"), [("\ud83d", "half a character"), ("\0", "a zero byte")])
def test_invalid_texts_are_refused_by_name(writer, write, name, wrong, what):
    """Tokenizers would complain about types, or misread the text."""
    with pytest.raises(ValueError, match=f"{name}.* has {what}.*at position 3"):
        write(writer, f"w1 {wrong} w2")


def test_texts_are_split_at_sentences(pipeline):
    writer = MemoryWriter(pipeline=pipeline, part_tokens=6)
    assert writer.split("w1 w2 w3 w4 w5. w6 w7 w8 w9 w10.") == ["w1 w2 w3 w4 w5.", "w6 w7 w8 w9 w10."]


def test_from_chat_finds_the_model_within_retries_and_fallbacks(chat):
    for given in (chat.with_retry(), chat.bind(stop=["w0"]).with_retry().with_fallbacks([chat])):
        assert MemoryWriter.from_chat(given).store is chat.store
    with pytest.raises(TypeError, match="Expected a ChatGradMem, bound or not, got str"):
        MemoryWriter.from_chat("smollm2-135m-qa")


def test_from_chat_takes_pipeline_and_store_from_the_chat_model(chat):
    for kind in (MemoryWriter, TurnMemory, GradMemCompressor):
        writer = kind.from_chat(chat, part_tokens=7)
        assert (writer.pipeline, writer.store, writer.part_tokens) == (chat.pipeline, chat.store, 7)
