"""Old turns in memory: history, classic memory, agents."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import LLMChain
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.stores import InMemoryByteStore
from langchain_gradmem import ChatGradMem, GradMemChatMessageHistory, MemoryStateStore, TurnMemory, references_of
from langchain_gradmem.classic import GradMemConversationMemory
from langchain_gradmem.middleware import GradMemMiddleware
from langgraph.checkpoint.memory import InMemorySaver


@pytest.fixture
def memory(pipeline):
    return TurnMemory(pipeline=pipeline, max_turns=3, keep_turns=2)


@pytest.fixture
def chat(pipeline, memory):
    return ChatGradMem(pipeline=pipeline, store=memory.store, max_tokens=3)


def turn(i):
    return [HumanMessage(f"w{i} w{i + 1}"), AIMessage(f"w{i + 2}")]


def test_cut_is_at_a_human_turn(memory):
    messages = [SystemMessage("w0"), *(m for i in range(5) for m in turn(i))]
    assert memory.cut(messages[:7]) == 0
    cut = memory.cut(messages)
    assert isinstance(messages[cut], HumanMessage)
    assert sum(isinstance(m, HumanMessage) for m in messages[cut:]) == 2


class TestHistory:
    def test_old_turns_go_into_memory_and_nothing_is_lost(self, memory):
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

    def test_a_failed_write_loses_nothing(self, pipeline):
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

    def test_clear(self, memory):
        history = GradMemChatMessageHistory(memory)
        for i in range(6):
            history.add_messages(turn(i))
        history.clear()
        assert history.messages == history.archive == []

    def test_settings_that_contradict_each_other(self, pipeline):
        with pytest.raises(ValueError, match=r"keep_turns \(5\) may not be more than max_turns \(2\)"):
            TurnMemory(pipeline=pipeline, max_turns=2, keep_turns=5)


class TestClassic:
    def test_in_a_chain(self, chat, memory):
        prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
        kept = GradMemConversationMemory(memory=memory)
        chain = LLMChain(llm=chat, prompt=prompt, memory=kept)
        for i in range(6):
            chain.invoke({"question": f"w{i}"})
        shown = kept.load_memory_variables({})["history"]
        assert references_of(shown[0])
        assert kept.memory_variables == ["history"]
        assert len(kept.chat_memory.archive) + len(shown) - 1 == 12
        kept.clear()
        assert kept.load_memory_variables({}) == {"history": []}

    async def test_async(self, memory):
        kept = GradMemConversationMemory(memory=memory)
        await kept.asave_context({"question": "w1"}, {"text": "w2"})
        assert [m.content for m in (await kept.aload_memory_variables({}))["history"]] == ["w1", "w2"]
        await kept.aclear()

    def test_what_is_to_be_remembered_must_be_clear(self, memory):
        kept = GradMemConversationMemory(memory=memory)
        with pytest.raises(ValueError, match="Set input_key"):
            kept.save_context({"a": "w1", "b": "w2"}, {"text": "w3"})
        GradMemConversationMemory(memory=memory, input_key="a").save_context({"a": "w1", "b": "w2"}, {"text": "w3"})


class TestAgent:
    def test_the_model_sees_memory_and_recent_turns(self, chat, memory):
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)], checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        tokens = []
        for i in range(10):
            state = agent.invoke({"messages": [HumanMessage(f"w{i} w{i + 1}")]}, config)
            tokens.append(state["messages"][-1].usage_metadata["input_tokens"])
        assert len(state["messages"]) == 20, "the agent's own messages stay"
        assert "gradmem_references" not in state, "private"
        assert max(tokens[6:]) <= max(tokens[4:6]) + 3, "one more part of old turns at most"
        assert memory.store.writes > 0

    async def test_async(self, chat, memory):
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)])
        messages = [m for i in range(5) for m in turn(i)] + [HumanMessage("w1")]
        state = await agent.ainvoke({"messages": messages})
        assert state["messages"][-1].usage_metadata["input_token_details"]["memory_vectors"] > 0

    def test_killed_and_resumed(self, tmp_path):
        """SIGKILL between turns; a new process goes on from the same SQLite file and directory of states."""
        script = Path(__file__).parent / "agent_run.py"
        command = [sys.executable, str(script), str(tmp_path)]
        first = subprocess.run([*command, "0", "6", "kill"], capture_output=True, text=True, check=False)
        assert first.returncode == -signal.SIGKILL, first.stderr
        second = subprocess.run([*command, "6", "8"], capture_output=True, text=True, check=False)
        assert second.returncode == 0, second.stderr
        turns, vectors, writes = map(int, second.stdout.split()[-3:])
        assert turns == 8
        assert vectors > 0
        assert writes <= 2, "what was written before the kill was written again"
        assert os.listdir(tmp_path / "states")
