"""Memory for agents."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.messages import HumanMessage, RemoveMessage, SystemMessage
from langchain_gradmem import ChatGradMem
from langchain_gradmem.middleware import GradMemMiddleware
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph.message import REMOVE_ALL_MESSAGES

ask = ChatGradMem._ask


def fail(*args):
    raise OSError("no connection")


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

    async def test_async_agents(self, chat, memory, turn):
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)])
        messages = [m for i in range(5) for m in turn(i)] + [HumanMessage("w1")]
        state = await agent.ainvoke({"messages": messages})
        assert state["messages"][-1].usage_metadata["input_token_details"]["memory_vectors"] > 0

    def test_removed_messages_are_forgotten(self, chat, memory):
        """By `SummarizationMiddleware` or an application: the agent still answers, and no state holds them."""
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)], checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        for i in range(6):
            agent.invoke({"messages": [HumanMessage(f"w{i} w{i + 1}")]}, config)
        before = list(memory.store.yield_keys())
        assert before
        messages = agent.get_state(config).values["messages"]
        for removed in ([RemoveMessage(id=messages[0].id)], [RemoveMessage(id=m.id) for m in messages[1:-2]]):
            agent.update_state(config, {"messages": removed})
            agent.invoke({"messages": [HumanMessage("w9")]}, config)
            assert not set(memory.store.yield_keys()) & set(before)
        agent.invoke({"messages": [RemoveMessage(id=REMOVE_ALL_MESSAGES), HumanMessage("w9")]}, config)
        assert list(memory.store.yield_keys()) == []

    def test_other_conversations_with_the_same_messages_keep_their_states(self, chat, memory):
        """In another thread, and in another agent's thread of the same name."""
        agents = [
            create_agent(chat, [], middleware=[GradMemMiddleware(memory)], checkpointer=InMemorySaver())
            for _ in range(2)
        ]
        threads = [(agents[0], "1"), (agents[0], "2"), (agents[1], "1")]
        for agent, thread in threads:
            for i in range(6):
                messages = [HumanMessage(f"w{i} w{i + 1}")]
                agent.invoke({"messages": messages}, {"configurable": {"thread_id": thread}})
        before = set(memory.store.yield_keys())
        for (agent, thread), left in zip(threads, (before, before, set()), strict=True):
            messages = [RemoveMessage(id=REMOVE_ALL_MESSAGES), HumanMessage("w9")]
            agent.invoke({"messages": messages}, {"configurable": {"thread_id": thread}})
            assert set(memory.store.yield_keys()) == left

    def test_without_a_checkpointer_states_are_entered_only_once(self, chat, memory, turn):
        """A call has no thread, so nothing could tell when its states are no longer needed."""
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)])
        messages = [m for i in range(5) for m in turn(i)] + [HumanMessage("w1")]
        for _ in range(3):
            agent.invoke({"messages": messages})
        entries = list(memory.store.store.entries())
        assert len({entry.key for entry in entries}) == len(entries) > 0

    def test_it_works_beside_summarization(self, chat, memory):
        """Turns that were never written are not hidden, and the question is always there."""
        summaries = SummarizationMiddleware(
            chat, trigger=("messages", 8), keep=("messages", 5), summary_prompt="w1 {messages}"
        )
        for middleware in ([summaries, GradMemMiddleware(memory)], [GradMemMiddleware(memory), summaries]):
            agent = create_agent(chat, [], middleware=middleware, checkpointer=InMemorySaver())
            for i in range(12):
                state = agent.invoke({"messages": [HumanMessage(f"w{i}")]}, {"configurable": {"thread_id": "1"}})
            assert len(state["messages"]) < 10

    def test_an_old_checkpoint_can_be_continued(self, chat, memory):
        """Its states were deleted since, but its messages are there."""
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)], checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        for i in range(6):
            agent.invoke({"messages": [HumanMessage(f"w{i}")]}, config)
        old = agent.get_state(config).config
        memory.store.gc([])
        state = agent.invoke({"messages": [HumanMessage("w9")]}, old)
        assert state["messages"][-1].usage_metadata["input_token_details"]["memory_vectors"] > 0

    def test_system_messages_stay_and_failed_writes_leave_the_text(self, chat, memory, turn, monkeypatch):
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)], system_prompt="w30")
        shown = []
        monkeypatch.setattr(
            type(chat),
            "_ask",
            lambda self, messages, *rest: shown.append(messages) or ask(self, messages, *rest),
        )
        messages = [SystemMessage("w31"), *(m for i in range(5) for m in turn(i)), HumanMessage("w1")]
        agent.invoke({"messages": messages})
        assert [m.content for m in shown[-1] if m.content in ("w30", "w31")] == ["w30", "w31"]
        assert len(shown[-1]) < len(messages)
        monkeypatch.setattr("gradmem_adapter.store.files.state_file_of", fail)
        with pytest.warns(RuntimeWarning, match="stay text: OSError"):
            agent.invoke({"messages": messages})
        assert len(shown[-1]) == len(messages) + 1

    def test_an_agent_can_be_killed_and_resumed(self, tmp_path):
        """SIGKILL between turns; a new process continues from the same SQLite file and directory of states."""
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
