"""A text of many segments in one state."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_segments import byte_tokenizer
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryState, WriteOptions
from gradmem_adapter.segments import segments
from gradmem_adapter.sequential import write_sequential

TEXT = tiny_text(50, 1)
OPTIONS = WriteOptions(steps=1)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(trained_length=40)


def test_each_segment_is_written_into_the_state_of_the_one_before(pipeline):
    parts = list(pipeline.segments(TEXT, 20))
    assert len(parts) == 3
    expected = pipeline.write(parts[0].text, steps=1)
    for part in parts[1:]:
        ids = torch.tensor([pipeline.tokenizer(part.text)["input_ids"]])
        expected = pipeline.model.update(expected, ids, steps=1)
    assert write_sequential(pipeline, iter(parts), OPTIONS).equal(expected)
    assert expected.context_tokens == sum(part.tokens for part in parts)


def test_a_saved_state_can_be_continued(pipeline):
    parts = list(pipeline.segments(TEXT, 20))
    first = MemoryState.from_bytes(write_sequential(pipeline, parts[:1], OPTIONS).to_bytes())
    assert write_sequential(pipeline, parts[1:], OPTIONS, first).equal(write_sequential(pipeline, parts, OPTIONS))


@pytest.mark.parametrize("text", ["w1w2w3w4w5 w6", "\n\nw1 w2 w3 w4 w5 w6"])
def test_segments_are_separated_by_white_space_only_where_the_text_is(pipeline, monkeypatch, text):
    """Scripts without spaces, for example, have none."""
    given, tokenizer, state = [], byte_tokenizer(), pipeline.write("w1")
    monkeypatch.setattr(pipeline, "tokenizer", tokenizer)
    monkeypatch.setattr(pipeline.model, "write", lambda ids, *_, **__: given.extend(ids[0].tolist()) or state)
    monkeypatch.setattr(pipeline.model, "update", lambda _, ids, **__: given.extend(ids[0].tolist()) or state)
    monkeypatch.setattr(pipeline, "encode_contexts", lambda text: [torch.tensor([tokenizer(text)["input_ids"]])])
    write_sequential(pipeline, segments(text, tokenizer, 6), OPTIONS)
    assert tokenizer.decode(given) == text.strip()


def test_empty_texts_and_several_states_are_refused(pipeline):
    with pytest.raises(ValueError, match="the document is empty"):
        write_sequential(pipeline, [], OPTIONS)
    for wrong in ("a state", ["a state"]):
        with pytest.raises(TypeError, match="memory must be a MemoryState"):
            pipeline.update(wrong, "w1")
    other = tiny_pipeline(trained_length=40, start="context")
    state = other.write("w1 w2")
    with pytest.raises(ValueError, match="The state has 6 vectors, but with start='context' text is written into 3"):
        other.update(MemoryState.concat([state, state]), "w3")
    with pytest.raises(ValueError, match="There is no text to write"):
        pipeline.update(pipeline.write("w1"), " \n")
    with pytest.raises(ValueError, match=r"got 2 states\. Update them one by one"):
        write_sequential(pipeline, pipeline.segments(TEXT, 20), OPTIONS, pipeline.write([TEXT[:20], TEXT[:30]]))


def test_more_than_the_trained_length_in_one_state_gives_one_warning(pipeline):
    first = pipeline.write(TEXT[:60])
    for write in (lambda: pipeline.write_document(TEXT, "sequential"), lambda: pipeline.update(first, TEXT)):
        with pytest.warns(UserWarning, match="trained on at most 40") as told:
            write()
        assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.update(first, "w1 w2")


@pytest.mark.parametrize(("start", "most"), [("slots", 89), ("context", 19), ("pooled_context", 19)])
def test_segments_that_do_not_fit_are_refused_before_the_first_is_written(start, most, monkeypatch):
    """A start that reads contexts reads the old memory, the text and the new memory together."""
    pipeline = tiny_pipeline(num_memory_tokens=70, start=start)
    state, text = pipeline.write("w1"), tiny_text(200, 1)
    pipeline.write_document(text, "sequential", segment_tokens=most, steps=0)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.model.base_model, "write", None)
        patched.setattr(pipeline.model.base_model, "update", None)
        for write in (lambda n: pipeline.write_document(text, "sequential", segment_tokens=n),
                      lambda n: pipeline.update(state, text, segment_tokens=n)):  # fmt: skip
            with pytest.raises(ValueError, match=f"160 positions, and old and new memory leave {most} of them"):
                write(most + 1)
    trained = tiny_pipeline(num_memory_tokens=70, start=start, trained_length=80)
    segments = trained.write_document(text, "sequential", steps=0).segments
    assert max(segment.tokens for segment in segments) == min(40, most)


def test_states_side_by_side_leave_fewer_positions_for_segments():
    pipeline = tiny_pipeline()
    both = MemoryState.concat([pipeline.write("w1")] * 40)
    pipeline.update(both, TEXT, segment_tokens=39, steps=0)
    with pytest.raises(ValueError, match=r"a state of 120 vectors: .* leave 39 of them"):
        pipeline.update(both, TEXT, segment_tokens=40, steps=0)


@pytest.mark.slow
def test_a_million_tokens_take_the_memory_of_a_hundred_thousand():
    def run(tokens):
        script = Path(__file__).with_name("sequential_run.py")
        done = subprocess.run([sys.executable, str(script), str(tokens)], capture_output=True, text=True, check=True)
        peak, kept, finite = done.stdout.split()[-3:]
        assert (int(kept) > tokens, finite) == (True, "True")
        return int(peak)

    assert run(1_000_000) <= 1.2 * run(100_000)
