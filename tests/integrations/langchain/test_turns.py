"""TurnMemory: which turns are old, what they are written as, and what a model is shown."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_gradmem import MemoryStateStore, TurnMemory, attach, marker, references_of
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStore


@pytest.fixture
def conversation(turn):
    """Several turns, one after another."""
    return lambda count: [message for i in range(count) for message in turn(i)]


def carriers(messages):
    return [message for message in messages if references_of(message)]


def test_old_turns_end_at_a_human_message(memory, conversation):
    """At least 2 and at most 3 turns stay text; older ones are written two at a time."""
    cuts = [memory.cut([SystemMessage("w0"), *conversation(count)]) for count in range(9)]
    assert cuts == [0, 0, 0, 0, 5, 5, 9, 9, 13]


def test_contradictory_settings_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"keep_turns \(5\) must not be greater than max_turns \(2\)"):
        TurnMemory(pipeline=pipeline, max_turns=2, keep_turns=5)


def test_system_messages_stay_text(memory, conversation):
    messages = [SystemMessage("w40 w41"), *conversation(3), SystemMessage("w42"), *conversation(6)]
    shown = memory.shown(messages)
    assert [m.content for m in shown if isinstance(m, SystemMessage)][:2] == ["w40 w41", "w42"]
    assert len(carriers(shown)) == 1
    assert not any("w40" in part or "w42" in part for part in memory.parts(messages))


def test_tool_calls_and_their_results_are_written(memory):
    call = {"name": "weather", "args": {"city": "Örm"}, "id": "1"}
    turn = [HumanMessage("w1"), AIMessage("w2", tool_calls=[call]), ToolMessage("21", tool_call_id="1", name="weather")]
    (text,) = memory.parts(turn)
    assert text == 'User: w1\nAssistant: w2 weather({"city": "Örm"})\nTool weather: 21'


def test_markers_of_old_messages_are_not_written_as_text(memory):
    (text,) = memory.parts([attach(HumanMessage(f"w1 {marker('a' * 32)}"), ["a" * 32])])
    assert text == "User: w1 "


@pytest.mark.parametrize("wrong", ["\ud800", "\0"])
def test_invalid_characters_in_old_turns_block_nothing(memory, conversation, wrong):
    """In a text, in what a tool is called with, or in what it returns."""
    call = {"name": "read", "args": {"name": f"w1{wrong}"}, "id": "1"}
    said = [AIMessage("w2", tool_calls=[call]), ToolMessage(f"w3{wrong}", tool_call_id="1", name=f"read{wrong}")]
    messages = [HumanMessage(f"w1 {wrong}"), *said, *conversation(5)]
    assert carriers(memory.shown(messages))


def test_long_turns_are_split(memory, conversation):
    messages = [HumanMessage(tiny_text(300)), AIMessage("w1"), *conversation(4)]
    (carrier,) = carriers(memory.shown(messages))
    tokens = sum(int(memory.store.get(reference).context_tokens[0]) for reference in references_of(carrier))
    assert tokens > 300


class TestManyParts:
    @pytest.fixture
    def memory(self):
        return TurnMemory(
            pipeline=tiny_pipeline(num_memory_tokens=5, trained_length=20),
            part_tokens=20,
            max_turns=1,
            keep_turns=1,
            max_parts=3,
        )

    @pytest.fixture
    def lines(self):
        """Messages that each fill a part."""
        return lambda count: [HumanMessage(tiny_text(18, seed=i)) for i in range(count)]

    def test_the_oldest_parts_are_merged_in_pairs(self, memory, lines):
        whole = [f"User: {message.content}" for message in lines(5)]
        assert memory.parts(lines(3)) == whole[:3]
        assert memory.parts(lines(4)) == ["\n".join(whole[:2]), whole[2], whole[3]]
        assert memory.parts(lines(5)) == ["\n".join(whole[:2]), "\n".join(whole[2:4]), whole[4]]

    def test_the_oldest_parts_are_then_dropped_with_a_warning(self, memory, lines):
        with pytest.warns(UserWarning, match="its oldest turns are no longer in memory"):
            parts = memory.parts(lines(12))
        assert len(parts) == 3
        assert parts[-1] == f"User: {lines(12)[-1].content}"

    def test_each_new_part_takes_at_most_two_writes(self, memory, lines):
        """Earlier parts stay as they are, except for the pair that is merged."""
        for count in range(1, 10):
            before = memory.store.writes
            memory.write(lines(count))
            assert memory.store.writes - before <= 2


class TestFailures:
    def test_a_failed_write_leaves_the_text_and_is_retried(self, pipeline, conversation, tmp_path):
        class Failing(MemoryStore):
            broken = True

            def put(self, states, entries, **how):
                if self.broken:
                    raise OSError("disk full")
                super().put(states, entries, **how)

        failing = Failing(tmp_path)
        memory = TurnMemory(pipeline=pipeline, store=MemoryStateStore(failing), max_turns=1, keep_turns=1)
        with pytest.warns(RuntimeWarning, match="stay text: OSError: disk full"):
            assert memory.shown(conversation(3)) == conversation(3)
        failing.broken = False
        assert carriers(memory.shown(conversation(3)))

    def test_a_damaged_state_is_rewritten_from_the_text(self, memory, conversation):
        (reference,) = references_of(carriers(memory.shown(conversation(4)))[0])
        good = memory.store.get(reference)
        (file,) = memory.store.store.path.rglob("*.safetensors")
        file.write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="is written again"):
            memory.shown(conversation(4))
        assert memory.store.get(reference) == good


def test_references_cover_the_last_cuts(memory, conversation):
    assert memory.references(conversation(3)) == memory.references(conversation(3), cuts=2) == []
    first, second = memory.references(conversation(4)), memory.references(conversation(6))
    assert first != second
    assert memory.references(conversation(5), cuts=2) == first
    assert memory.references(conversation(6), cuts=2) == [*first, *second]
