"""An agent with a SQLite checkpointer: runs a range of turns, and then kills itself if asked to."""

import os
import signal
import sys
from pathlib import Path

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[2])])
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_gradmem import ChatGradMem, MemoryStateStore, TurnMemory
from langchain_gradmem.middleware import GradMemMiddleware
from langgraph.checkpoint.sqlite import SqliteSaver
from tiny_pipeline import tiny_pipeline

folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
pipeline = tiny_pipeline()
store = MemoryStateStore(folder / "states")
memory = TurnMemory(pipeline=pipeline, store=store, max_turns=3, keep_turns=2)
chat = ChatGradMem(pipeline=pipeline, store=store, max_tokens=3)
with SqliteSaver.from_conn_string(str(folder / "agent.sqlite")) as checkpointer:
    agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)], checkpointer=checkpointer)
    for i in range(first, last):
        state = agent.invoke({"messages": [HumanMessage(f"w{i} w{i + 1}")]}, {"configurable": {"thread_id": "1"}})
    if len(sys.argv) > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    usage = state["messages"][-1].usage_metadata
    print(len(state["messages"]) // 2, usage["input_token_details"]["memory_vectors"], store.writes)
