"""Memory for agents."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_gradmem.middleware import GradMemMiddleware
from langgraph.checkpoint.memory import InMemorySaver


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

    async def test_async(self, chat, memory, turn):
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
