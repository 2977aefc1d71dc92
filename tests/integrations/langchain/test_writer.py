"""MemoryWriter and TurnMemory: what does not fit is cut, what fits is joined."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_gradmem import GradMemCompressor, MemoryWriter, TurnMemory
from tiny import tiny_text

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
        ({"steps": -1}, ValueError, "steps must be an integer from 0"),
        (3, ValueError, "WriteOptions"),
    ],
)
def test_options_are_checked_where_they_are_given(pipeline, options, error, message):
    for kind in (MemoryWriter, TurnMemory, GradMemCompressor):
        with pytest.raises(error, match=message):
            kind(pipeline=pipeline, write_options=options)


def test_a_text_is_split_into_equal_parts_that_fit(writer):
    text = tiny_text(400)
    parts = writer.split(text)
    assert "".join(parts) == text
    assert [len(part.split()) for part in parts] == [134, 134, 132]  # of 160 positions, 3 are for the memory
    assert writer.split(TEXTS[0]) == TEXTS[:1]


def test_lines_are_joined_as_long_as_they_fit(writer):
    lines = [tiny_text(60, seed=i) for i in range(5)]
    assert writer.join(lines) == ["\n".join(lines[:2]), "\n".join(lines[2:4]), lines[4]]


def test_a_conversation_is_cut_at_a_human_turn(pipeline):
    memory = TurnMemory(pipeline=pipeline, max_turns=3, keep_turns=2)
    turns = [message for i in range(5) for message in (HumanMessage(f"w{i} w{i + 1}"), AIMessage(f"w{i + 2}"))]
    messages = [SystemMessage("w0"), *turns]
    assert memory.cut(messages[:7]) == 0
    cut = memory.cut(messages)
    assert isinstance(messages[cut], HumanMessage)
    assert sum(isinstance(m, HumanMessage) for m in messages[cut:]) == 2


def test_settings_that_contradict_each_other(pipeline):
    with pytest.raises(ValueError, match=r"keep_turns \(5\) may not be more than max_turns \(2\)"):
        TurnMemory(pipeline=pipeline, max_turns=2, keep_turns=5)
