"""Long texts in memory: each segment gets the same state as by itself."""

import pytest
import torch
from tiny import tiny_text
from tiny_pipeline import byte_pipeline, tiny_pipeline

from gradmem_adapter import GradMemConfig, MemoryStore, WriteOptions

TEXT = f"{tiny_text(30, 1)}.\n\n{tiny_text(50, 2)}.\n\n{tiny_text(35, 3)}."


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(trained_length=50, num_memory_tokens=25)


def test_parallel_equals_segment_by_segment(pipeline):
    document = pipeline.write_document(TEXT)
    assert document.mode == "parallel"
    assert len(document) == len(document.segments) == len(document.states) == 3
    assert TEXT[:10] not in repr(document)
    assert all(segment.tokens <= 50 for segment in document.segments)
    assert document.states.context_tokens.tolist() == [segment.tokens for segment in document.segments]
    for segment, state in zip(document.segments, document.states, strict=True):
        torch.testing.assert_close(state.vectors, pipeline.write(segment.text).vectors)


def test_segments_have_two_tokens_per_vector_up_to_the_trained_length():
    for m, trained, most in ((6, 50, 12), (26, 50, 50), (3, None, None)):
        assert GradMemConfig(num_memory_tokens=m, trained_length=trained).segment_tokens == most
    segments = list(tiny_pipeline(num_memory_tokens=6, trained_length=50).segments(TEXT))
    assert 10 <= max(segment.tokens for segment in segments) <= 12


def test_texts_in_pieces_and_write_options_are_accepted(pipeline):
    options = {"segment_tokens": 20, "overlap": 0, "steps": 2}
    document = pipeline.write_document(TEXT, **options)
    assert document.states.write_losses.shape == (len(document), 3)
    assert "".join("".join(segment.text for segment in document.segments).split()) == "".join(TEXT.split())
    lines = pipeline.write_document(iter(TEXT.splitlines(keepends=True)), **options)
    assert (lines.segments, lines.states) == (document.segments, document.states)
    assert pipeline.write_document(TEXT, segment_tokens=20, overlap=0, options=WriteOptions(steps=2)) == document


def test_segments_can_be_read_side_by_side(pipeline):
    document = pipeline.write_document(TEXT)
    assert document.side_by_side().vectors.shape[:2] == (1, 3 * 25)
    some = document.side_by_side([2, 0])
    assert torch.equal(some.vectors[0], torch.cat([document.states[2].vectors[0], document.states[0].vectors[0]]))
    assert document.side_by_side(torch.tensor([2, 0]).numpy()).equal(some)
    assert len(pipeline.generate(["w1 w2"], memory=some, max_new_tokens=3)) == 1


@pytest.mark.parametrize("max_tokens", [None, 1])
def test_fidelity_is_measured_for_each_segment(pipeline, max_tokens):
    document = pipeline.write_document(TEXT, steps=20, optimizer="adam", lr=0.05)
    found = document.fidelity(pipeline, max_tokens=max_tokens)
    for i, (segment, state) in enumerate(zip(document.segments, document.states, strict=True)):
        alone = pipeline.fidelity(segment.text, state)
        assert (found.greedy[i], found.teacher_forced[i]) == (alone.greedy[0], alone.teacher_forced[0])
    assert found.teacher_forced.min() > 0  # otherwise the comparison shows nothing


@pytest.mark.filterwarnings("ignore:One state now stands for")
class TestSequential:
    def test_one_state_holds_all_segments(self, pipeline):
        options = WriteOptions(steps=5, optimizer="adam", lr=0.05)
        document = pipeline.write_document(TEXT, "sequential", segment_tokens=20, options=options)
        assert len(document) > 3
        assert document.states.vectors.shape == document.side_by_side().vectors.shape == (1, 25, 32)
        found = document.fidelity(pipeline)
        assert found.greedy.shape == found.teacher_forced.shape == (len(document),)
        with pytest.raises(ValueError, match="one state for all segments"):
            document.side_by_side([0])

    def test_fidelity_is_the_share_recited_anywhere(self, monkeypatch):
        pipeline = tiny_pipeline(trained_length=50, num_memory_tokens=25)
        document = pipeline.write_document(TEXT, "sequential", segment_tokens=20, steps=0)
        ids = pipeline.tokenizer(TEXT)["input_ids"]
        recital = [*ids[:30], *ids[33:60], *reversed(ids[60:80]), *ids[-3:]]
        monkeypatch.setattr(pipeline.model.base_model, "reconstruct", lambda memory, length: torch.tensor([recital]))
        lengths, found = [segment.tokens for segment in document.segments], document.fidelity(pipeline)
        known, place = [*range(30), *range(33, 60)], 0
        for length, share in zip(lengths, found.greedy.tolist(), strict=True):
            kept = sum(place <= i < place + length for i in known)
            assert share == pytest.approx(kept / length, abs=3.5 / length)  # runs shorter than four do not count
            place += length
        assert found.greedy[0] == 1
        assert found.greedy[-1] == 0

    def test_segments_leave_room_for_the_text_already_known(self, pipeline):
        document = pipeline.write_document(iter(TEXT.splitlines(keepends=True)), "sequential", steps=0)
        assert max(segment.tokens for segment in document.segments) <= 25
        assert document.segments == tuple(pipeline.segments(TEXT, 25, overlap=0))

    def test_a_document_equals_its_beginning_updated_with_the_rest(self, pipeline):
        first, *rest = pipeline.segments(TEXT, 20, overlap=0)
        state = pipeline.write(first.text, steps=2)
        for segment in rest:
            state = pipeline.update(state, segment.text, segment_tokens=20, steps=2)
        document = pipeline.write_document(TEXT, "sequential", segment_tokens=20, steps=2)
        assert state == document.states
        again = pipeline.update(pipeline.write(first.text, steps=2), TEXT[first.end :], segment_tokens=20, steps=2)
        assert again == state

    def test_invalid_updates_and_documents_are_refused(self, pipeline):
        state = pipeline.write(["w1 w2", "w3"])
        with pytest.raises(ValueError, match="A text can be added to one state, got 2 states"):
            pipeline.update(state, "w4")
        with pytest.raises(ValueError, match="no text"):
            pipeline.write_document(" ", "sequential")
        with pytest.raises(ValueError, match="Segments of 50 tokens leave no room"):
            pipeline.write_document(TEXT, "sequential", segment_tokens=50)
        with pytest.raises(ValueError, match="written by model"):
            pipeline.update(tiny_pipeline(seed=1).write("w1"), "w4", segment_tokens=10)

    def test_options_without_effect_are_refused_before_anything_is_written(self, pipeline, monkeypatch):
        monkeypatch.setattr(pipeline.model.base_model, "write", None)
        with pytest.raises(ValueError, match="max_tokens limits a batch of segments"):
            pipeline.write_document(TEXT, "sequential", max_tokens=100)
        with pytest.raises(ValueError, match="each text into a state of its own and cannot continue from a state"):
            pipeline.write_document(TEXT, "sequential", objective="self_study")


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (" \n", {}, ValueError, "no text to write: the document is empty"),
        (TEXT, {"mode": "serial"}, ValueError, "mode must be one of"),
        (TEXT, {"segment_tokens": 0}, ValueError, "at least 1 token,"),
        (TEXT, {"segment_tokens": 148}, ValueError, "at most 135 tokens, the limit of the model, got 148"),
        (TEXT, {"overlap": 13}, ValueError, "below a quarter of a segment of 50 tokens"),
        (None, {}, TypeError, "or its token ids, got NoneType"),
    ],
)
def test_invalid_input_is_refused(pipeline, text, options, error, message):
    with pytest.raises(error, match=message):
        pipeline.write_document(text, **options)


def test_a_text_that_is_the_name_of_a_file_is_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    for write in (pipeline.write_document, lambda text: pipeline.update(pipeline.write("w1"), text)):
        with pytest.raises(ValueError, match=r"name of a file, 'book\.txt'.*open\('book\.txt'\)"):
            write("book.txt")
    with open("book.txt") as file:
        assert pipeline.write_document(file).states == pipeline.write_document(TEXT).states


def test_a_file_name_among_several_texts_is_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    store = MemoryStore(tmp_path / "store")
    for write in (pipeline.write, pipeline.write_many, lambda texts: store.add(pipeline, texts)):
        with pytest.raises(
            ValueError, match=r"name of a file, 'book\.txt'.*open\('book\.txt'\)\.read\(\).*a line break"
        ):
            write(["w1", "book.txt"])
        assert len(write(["w1", "book.txt\n", TEXT])) == 3


def test_a_segment_may_be_the_name_of_a_file(pipeline, tmp_path, monkeypatch):
    """Otherwise a client could find out which files a server has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    store = MemoryStore(tmp_path / "store")
    assert store.add(pipeline, "book.txt", offsets=[(0, 8)]) == store.add_document(pipeline, ["book.txt"])


def test_without_a_trained_length_segment_tokens_is_required():
    pipeline = tiny_pipeline()
    with pytest.raises(
        ValueError, match=r"not say its trained length, so the number of tokens .* unknown: pass segment_tokens"
    ):
        pipeline.write_document(TEXT)
    assert len(pipeline.write_document(TEXT, segment_tokens=30)) > 3


@pytest.mark.parametrize("text", ["", " ", " \n\t\n"])
def test_white_space_is_refused(text, tmp_path):
    """A byte tokenizer would turn it into tokens."""
    pipeline, store = byte_pipeline(), MemoryStore(tmp_path)
    state = pipeline.write("a")
    for write in (
        pipeline.write,
        lambda text: pipeline.write_many([text]),
        lambda text: pipeline.fidelity(text, state),
        lambda text: store.add(pipeline, text),
    ):
        with pytest.raises(ValueError, match="Context 0 is empty: there is nothing to write"):
            write(text)
    with pytest.raises(ValueError, match="Context 1 is empty"):
        store.add(pipeline, ["b", text])
    for write in (
        pipeline.write_document,
        lambda text, **how: pipeline.write_document(text, "sequential", **how),
        lambda text, **how: store.add_document(pipeline, text, **how),
        lambda text, **how: pipeline.update(state, text, **how),
    ):
        with pytest.raises(ValueError, match="There is no text to write: the document is empty"):
            write(text, segment_tokens=20)
    assert len(store) == 0
