"""A long conversation: old turns become memory, the prompt stays as long as it is.

python examples/langchain_conversation.py
"""

from __future__ import annotations

from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_gradmem import ChatGradMem, GradMemChatMessageHistory, TurnMemory, references_of
from langchain_pipeline import arguments, open_pipeline

FACT = "My dog is called Biscuit."


def main() -> None:
    args = arguments(__doc__, turns=30, max_tokens=8)
    pipeline, write_options = open_pipeline(args.checkpoint)
    memory = TurnMemory(pipeline=pipeline, max_turns=6, keep_turns=3, write_options=write_options)
    chat = ChatGradMem(pipeline=pipeline, store=memory.store, max_tokens=args.max_tokens)
    history = GradMemChatMessageHistory(memory)
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
    chain = RunnableWithMessageHistory(
        prompt | chat, lambda session_id: history, input_messages_key="question", history_messages_key="history"
    )

    print("turn  prompt tokens  in memory")
    for turn in range(1, args.turns + 1):
        question = FACT if turn == 1 else f"Tell me one thing about the number {turn}."
        usage = chain.invoke({"question": question}, {"configurable": {"session_id": "1"}}).usage_metadata
        details = usage["input_token_details"]
        saved = details.get("memory_saved", 0) + details.get("memory_vectors", 0)
        print(f"{turn:4}  {usage['input_tokens']:13}  {saved:4} tokens in {details.get('memory_vectors', 0)} vectors")

    (carrier,) = (message for message in history.messages if references_of(message))
    first = memory.store.get(references_of(carrier)[0])
    text = memory.parts(history.archive)[0]
    fidelity = pipeline.fidelity(text, first)
    print(f"\nThe first state holds the turns that begin with {text.splitlines()[0]!r}.")
    print(f"Tokens of it that greedy decoding gets back: {fidelity.greedy.item():.1%}")
    print(f"The same with the true tokens before each shown: {fidelity.teacher_forced.item():.1%}")


if __name__ == "__main__":
    main()
