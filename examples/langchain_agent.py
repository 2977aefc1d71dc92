"""An agent that is killed between turns and continues in a new process, with its memory.

    python examples/langchain_agent.py

Messages and references are kept in a SQLite file, memory states in a directory beside it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_gradmem import ChatGradMem, MemoryStateStore, TurnMemory
from langchain_gradmem.middleware import GradMemMiddleware
from langchain_pipeline import arguments, open_pipeline
from langgraph.checkpoint.sqlite import SqliteSaver


def run(checkpoint: str, folder: Path, first: int, last: int) -> None:
    """Run turns `first` to `last` of one conversation."""
    store = MemoryStateStore(folder / "states")
    chat = ChatGradMem(pipeline=open_pipeline(checkpoint), store=store, max_tokens=8)
    memory = TurnMemory.from_chat(chat, max_turns=3, keep_turns=2)
    with SqliteSaver.from_conn_string(str(folder / "agent.sqlite")) as checkpointer:
        agent = create_agent(chat, [], middleware=[GradMemMiddleware(memory)], checkpointer=checkpointer)
        for turn in range(first, last + 1):
            question = HumanMessage(f"Tell me one thing about the number {turn}.")
            state = agent.invoke({"messages": [question]}, {"configurable": {"thread_id": "1"}})
            usage = state["messages"][-1].usage_metadata
            vectors = usage["input_token_details"].get("memory_vectors", 0)
            print(
                f"turn {turn}: {len(state['messages'])} messages, {usage['input_tokens']} prompt tokens, {vectors} of "
                f"them memory, {store.writes} writes in this process",
                flush=True,
            )


def main() -> None:
    args = arguments(__doc__, folder="", first=0, last=0)
    if args.folder:  # one of the two processes
        run(args.checkpoint, Path(args.folder), args.first, args.last)
        if args.first == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--checkpoint", args.checkpoint]
        killed = subprocess.run([*command, "--first", "1", "--last", "5"], check=False)
        print(f"The first process ended with signal {-killed.returncode}.", flush=True)
        subprocess.run([*command, "--first", "6", "--last", "7"], check=True)


if __name__ == "__main__":
    main()
