"""A history whose old turns are in memory."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, message_to_dict
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_gradmem import (
    GradMemChatMessageHistory,
    MemoryStateStore,
    StoredChatMessageHistory,
    TurnMemory,
    references_of,
)
from tiny import tiny_text


class TestHistory:
    def test_old_turns_go_into_memory_and_nothing_is_lost(self, memory, turn):
        history = GradMemChatMessageHistory(memory)
        everything = []
        for i in range(12):
            history.add_messages(turn(i))
            everything += turn(i)
            shown = history.messages
            recent = [m for m in shown if not references_of(m)]
            assert [m.content for m in history.archive + recent] == [m.content for m in everything]
            assert sum(isinstance(m, HumanMessage) for m in shown) <= 3
        (carrier,) = (m for m in history.messages if references_of(m))
        assert isinstance(carrier, SystemMessage)
        states = [memory.store.get(reference) for reference in references_of(carrier)]
        text = memory.parts(history.archive)
        tokens = [len(memory.pipeline.tokenizer(part)["input_ids"]) for part in text]
        assert [int(state.context_tokens[0]) for state in states] == tokens

    def test_a_copy_is_independent(self, memory, turn):
        history = GradMemChatMessageHistory(memory)
        history.add_messages(turn(0))
        same = copy.deepcopy(history)
        same.add_messages(turn(1))
        assert [m.content for m in same.messages] == [m.content for m in turn(0) + turn(1)]
        assert history.messages == turn(0)

    def test_thirty_turns_with_a_chain_stay_bounded(self, chat, memory):
        prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
        history = GradMemChatMessageHistory(memory)
        chain = RunnableWithMessageHistory(
            prompt | chat, lambda session_id: history, input_messages_key="question", history_messages_key="history"
        )
        tokens = [
            chain.invoke({"question": f"w{i} w{i + 1}"}, {"configurable": {"session_id": "1"}}).usage_metadata[
                "input_tokens"
            ]
            for i in range(30)
        ]
        # 3 vectors for each part of old turns, and at most 3 turns of text.
        assert max(tokens[8:]) <= max(tokens[:8]) + 3 * 2
        assert len(history.archive) >= 2 * 26

    def test_clear_also_deletes_the_states(self, memory, turn):
        history = GradMemChatMessageHistory(memory)
        (other,) = memory.store.write(memory.pipeline, "w1 w2")
        for i in range(20):
            history.add_messages(turn(i))
        history.clear()
        assert history.messages == history.archive == history.references == []
        assert list(memory.store.yield_keys()) == [other]

    def test_another_session_with_the_same_turns_keeps_its_states(self, chat, memory, turn):
        """Its messages were read before the others were cleared, and are sent to the model afterwards."""
        ended, longer, other = (GradMemChatMessageHistory(memory) for _ in range(3))
        for i in range(6):
            for history in (ended, longer, other):
                history.add_messages(turn(i))
        shown, copied = other.messages, copy.deepcopy(other)
        copied_shown = copied.messages
        for i in range(6, 12):
            longer.add_messages(turn(i))
        ended.clear()
        longer.clear()
        assert chat.invoke(shown).response_metadata["gradmem"] == other.references
        other.clear()
        assert chat.invoke(copied_shown).response_metadata["gradmem"] == copied.references
        copied.clear()
        assert list(memory.store.yield_keys()) == []

    def test_clearing_a_copy_clears_the_conversation(self, memory, turn):
        """As when it was pickled and loaded again."""
        history = GradMemChatMessageHistory(memory)
        for i in range(6):
            history.add_messages(turn(i))
        assert list(memory.store.yield_keys())
        copy.copy(history).clear()
        assert list(memory.store.yield_keys()) == []

    def test_clearing_a_wrapped_history_needs_a_session_id(self, chat, memory, turn):
        unnamed, named = (
            GradMemChatMessageHistory(memory, InMemoryChatMessageHistory(), session_id) for session_id in (None, "1")
        )
        for i in range(6):
            unnamed.add_messages(turn(i))
            named.add_messages(turn(i + 20))
        shown, states = unnamed.messages, len(list(memory.store.yield_keys()))
        GradMemChatMessageHistory(memory, named.history, "1").clear()
        assert len(list(memory.store.yield_keys())) < states
        unnamed.clear()
        assert chat.invoke(shown).response_metadata["gradmem"]
        with pytest.raises(TypeError, match="session_id must be a string, got"):
            GradMemChatMessageHistory(memory, InMemoryChatMessageHistory(), 7)

    def test_a_failed_write_is_not_swallowed_and_not_permanent(self, chat, pipeline, monkeypatch):
        """`RunnableWithMessageHistory` only logs what `add_messages` raises, and the turn would be lost."""
        memory = TurnMemory(pipeline=pipeline, store=chat.store, max_turns=1, keep_turns=1)
        history = GradMemChatMessageHistory(memory)
        chain = RunnableWithMessageHistory(chat, lambda session_id: history)
        session = {"configurable": {"session_id": "1"}}
        chain.invoke([HumanMessage("w1")], session)
        with monkeypatch.context() as patch:
            patch.setattr(chat.store.store, "put", fail)
            with pytest.warns(RuntimeWarning, match="stay text: OSError: disk full"):
                chain.invoke([HumanMessage("w2")], session)
        assert [m.content for m in history.history.messages if isinstance(m, HumanMessage)] == ["w1", "w2"]
        assert references_of(history.messages[0])

    def test_a_long_turn_does_not_block_later_ones(self, memory, turn):
        history = GradMemChatMessageHistory(memory)
        history.add_messages([HumanMessage(tiny_text(400)), AIMessage("w1")])
        for i in range(6):
            history.add_messages(turn(i))
        assert len(history.messages) <= 1 + 2 * memory.max_turns


def fail(*_, **how):
    raise OSError("disk full")


class TestPersistence:
    def test_a_history_can_wrap_another_one(self, memory, turn):
        """The other one keeps every message; a second wrapper shows the same, and writes nothing again."""
        kept = StoredChatMessageHistory(memory.store, "Ada's session / 1")
        history = GradMemChatMessageHistory(memory, kept)
        for i in range(6):
            history.add_messages(turn(i))
        assert kept.messages == [message for i in range(6) for message in turn(i)]
        writes = memory.store.writes
        again = GradMemChatMessageHistory(memory, kept)
        assert again.messages == history.messages
        assert references_of(again.messages[0]) == again.references
        assert memory.store.writes == writes
        assert {entry.source for entry in memory.store.store.entries()} == {"session Ada's session / 1"}

    def test_another_process_can_continue(self, pipeline, turn, tmp_path):
        def history(session):
            store = MemoryStateStore(tmp_path)
            memory = TurnMemory(pipeline=pipeline, store=store, max_turns=3, keep_turns=2)
            return GradMemChatMessageHistory(memory, StoredChatMessageHistory(store, session))

        for i in range(6):
            history("1").add_messages(turn(i))
            history("2").add_messages(turn(i + 20))
        shown = history("1").messages
        assert references_of(shown[0])
        history("2").clear()
        assert history("2").messages == []
        resumed = history("1")
        assert resumed.messages == shown
        assert resumed.memory.store.writes == 0

    def test_sessions_of_one_name_in_two_directories_are_separate(self, chat, memory, turn, tmp_path):
        """Even with one store of states."""
        kept = [StoredChatMessageHistory(MemoryStateStore(tmp_path / name), "1") for name in "ab"]
        kept.append(StoredChatMessageHistory(memory.store, "1"))
        histories = [GradMemChatMessageHistory(memory, one) for one in kept]
        for i in range(6):
            for history in histories:
                history.add_messages(turn(i))
        shown = histories[1].messages
        histories[0].clear()
        histories[2].clear()
        assert chat.invoke(shown).response_metadata["gradmem"] == histories[1].references

    def test_sessions_are_separate_by_tenant_and_safe_across_threads(self, memory, turn):
        other = MemoryStateStore(memory.store.store, namespace="other")
        with ThreadPoolExecutor(4) as threads:
            for i in range(8):
                threads.submit(StoredChatMessageHistory(memory.store, "1").add_messages, turn(i))
        assert len(StoredChatMessageHistory(memory.store, "1").messages) == 16
        assert StoredChatMessageHistory(other, "1").messages == []

    def test_a_damaged_session_is_named_and_can_be_cleared(self, memory, turn):
        kept = StoredChatMessageHistory(memory.store, "1")
        kept.add_messages(turn(0))
        kept.path.write_text(kept.path.read_text()[:9])
        for use in (lambda: kept.messages, lambda: kept.add_messages(turn(1))):
            with pytest.raises(
                ValueError, match=rf"session in '{kept.path}' \(clear\(\) forgets it\) cannot be opened"
            ):
                use()
        kept.clear()
        kept.add_messages(turn(1))
        assert kept.messages == turn(1)

    def test_a_session_id_must_be_a_string(self, memory):
        with pytest.raises(TypeError, match="session_id must be a string, got"):
            StoredChatMessageHistory(memory.store, 7)

    def test_garbage_is_collected_and_other_sessions_are_kept(self, memory, turn):
        histories = [GradMemChatMessageHistory(memory) for _ in range(2)]
        for i in range(12):
            histories[0].add_messages(turn(i))
            histories[1].add_messages(turn(i + 20))
        before = len(list(memory.store.yield_keys()))
        used = [reference for history in histories for reference in history.references]
        assert memory.store.gc(used) == before - len(used) > 0
        assert sorted(memory.store.yield_keys()) == sorted(used)
        shown = histories[1].messages
        assert memory.store.gc(histories[0].references) > 0
        assert histories[1].messages == shown, "written anew from the text"

    @pytest.mark.parametrize("stored", [True, False])
    def test_superseded_states_are_deleted_by_any_history_object(self, memory, turn, stored):
        """As in a web server, with a new object for every request."""
        kept = StoredChatMessageHistory(memory.store, "1") if stored else InMemoryChatMessageHistory()
        for i in range(40):
            GradMemChatMessageHistory(memory, kept, "1").add_messages(turn(i))
            assert len(list(memory.store.yield_keys())) <= 2 * memory.max_parts
        GradMemChatMessageHistory(memory, kept, "1").clear()
        assert list(memory.store.yield_keys()) == []

    def test_adding_messages_does_not_bring_cleared_ones_back(self, memory, turn, monkeypatch):
        adds, clears = (StoredChatMessageHistory(memory.store, "1") for _ in range(2))
        clears.clear()  # there is no session yet
        adds.add_messages(turn(0))
        read, go = threading.Event(), threading.Event()

        def slowly(message):
            read.set()
            go.wait(5)
            return message_to_dict(message)

        monkeypatch.setattr("langchain_gradmem.chat_message_histories.message_to_dict", slowly)
        with ThreadPoolExecutor(2) as threads:
            added = threads.submit(adds.add_messages, turn(1))
            read.wait()
            cleared = threads.submit(clears.clear)
            wait([cleared], timeout=0.2)
            go.set()
            added.result(), cleared.result()
        assert adds.messages == []

    @pytest.mark.parametrize("use", ["add", "read"])
    def test_states_being_written_do_not_outlive_a_cleared_session(self, memory, turn, monkeypatch, use):
        """It is cleared through another object; `RunnableWithMessageHistory` makes one for every call."""
        slow, other = (GradMemChatMessageHistory(memory, StoredChatMessageHistory(memory.store, "1")) for _ in range(2))
        for i in range(6):
            other.add_messages(turn(i))
        write = TurnMemory.write

        def cleared_before(*args):
            monkeypatch.undo()
            other.clear()
            return write(*args)

        monkeypatch.setattr(TurnMemory, "write", cleared_before)
        if use == "add":
            slow.add_messages(turn(6))
        else:
            assert references_of(slow.messages[0])
        assert list(memory.store.yield_keys()) == []
        assert slow.messages == []

    async def test_async_methods(self, memory, turn):
        history = GradMemChatMessageHistory(memory, StoredChatMessageHistory(memory.store, "1"))
        for i in range(6):
            await history.aadd_messages(turn(i))
        assert references_of((await history.aget_messages())[0])
        await history.aclear()
        assert await history.aget_messages() == []
