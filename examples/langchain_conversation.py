"""A long conversation that begins with eight facts: how many can be answered from memory and the recent turns, from the
recent turns alone, and from all turns as text? Messages and memory states are in one directory and outlive the process.

    python examples/langchain_conversation.py
"""

from __future__ import annotations

import tempfile
from statistics import mean

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_gradmem import (
    ChatGradMem,
    GradMemChatMessageHistory,
    MemoryStateStore,
    StoredChatMessageHistory,
    TurnMemory,
)
from langchain_pipeline import arguments, open_pipeline

FACTS = [
    ("My dog is called Biscuit.", "What is the dog called?", "Biscuit"),
    ("My sister Ada lives in Lisbon.", "Where does Ada live?", "Lisbon"),
    ("I work as a baker.", "What is the work of the user?", "baker"),
    ("My car is green.", "What colour is the car?", "green"),
    ("My brother Tom plays the violin.", "What does Tom play?", "violin"),
    ("I was born in March.", "In which month was the user born?", "March"),
    ("My favourite food is lentil soup.", "What is the favourite food of the user?", "lentil"),
    ("My neighbour keeps bees.", "What does the neighbour keep?", "bees"),
]
"""What the user says, the later question, and what the answer must contain."""


def turn(number: int) -> list[BaseMessage]:
    """A turn of the conversation: first the facts, then small talk."""
    if number <= len(FACTS):
        return [HumanMessage(FACTS[number - 1][0]), AIMessage("Thank you for telling me.")]
    return [HumanMessage(f"Is {number} an even number?"), AIMessage("No." if number % 2 else "Yes, it is.")]


def main() -> None:
    args = arguments(__doc__, turns=40, max_tokens=16)
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStateStore(folder)
        chat = ChatGradMem(pipeline=open_pipeline(args.checkpoint), store=store, max_tokens=args.max_tokens)
        memory = TurnMemory.from_chat(chat, max_turns=6, keep_turns=3)

        def history(session: str) -> GradMemChatMessageHistory:
            """The history of a session, opened again at every turn, as in a web server."""
            return GradMemChatMessageHistory(memory, StoredChatMessageHistory(store, session))

        print("turns  from                     answered  prompt tokens")
        for number in range(1, args.turns + 1):
            history("1").add_messages(turn(number))
            if number not in (args.turns // 4, args.turns // 2, args.turns):
                continue
            everything = history("1").history.messages
            ways = {
                "memory and recent turns": history("1").messages,
                "recent turns": everything[memory.cut(everything) :],
                "all turns as text": everything,
            }
            for way, messages in ways.items():
                answers = chat.batch([[*messages, HumanMessage(question)] for _, question, _ in FACTS])
                right = sum(
                    expected.lower() in answer.text.lower()
                    for answer, (_, _, expected) in zip(answers, FACTS, strict=True)
                )
                tokens = mean(answer.usage_metadata["input_tokens"] for answer in answers)
                print(f"{number:5}  {way:23}  {right:4} of {len(FACTS)}  {tokens:13.0f}", flush=True)
        history("1").clear()
        print(f"States left after the session was cleared: {len(list(store.yield_keys()))}")


if __name__ == "__main__":
    main()
