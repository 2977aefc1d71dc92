"""A history whose old turns are in memory."""

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.stores import InMemoryByteStore
from langchain_gradmem import GradMemChatMessageHistory, MemoryStateStore, TurnMemory, references_of


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

    def test_a_failed_write_loses_nothing(self, pipeline, turn):
        class Failing(InMemoryByteStore):
            broken = True

            def mset(self, key_value_pairs):
                if self.broken:
                    raise OSError("disk full")
                super().mset(key_value_pairs)

        bytes_store = Failing()
        memory = TurnMemory(pipeline=pipeline, store=MemoryStateStore(bytes_store), max_turns=1, keep_turns=1)
        history = GradMemChatMessageHistory(memory)
        history.add_messages(turn(0))
        with pytest.raises(OSError, match="disk full"):
            history.add_messages(turn(1))
        assert [m.content for m in history.messages] == [m.content for m in turn(0) + turn(1)]
        bytes_store.broken = False
        history.add_messages(turn(2))
        assert [m.content for m in history.archive] == [m.content for m in turn(0) + turn(1)]

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

    def test_clear(self, memory, turn):
        history = GradMemChatMessageHistory(memory)
        for i in range(6):
            history.add_messages(turn(i))
        history.clear()
        assert history.messages == history.archive == []
