"""A long conversation that begins with eight facts: how many can be answered later, depending on what is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_gradmem import ChatGradMem, TurnMemory
from peft import PeftModel

from evaluation.data import Rows, group
from gradmem_adapter import GradMemPipeline, WriteOptions

from .base import OPTIONS, Measurement, Task

if TYPE_CHECKING:
    from evaluation.run import Answerer

FACTS = [
    ("My dog is called {}.", "What is the dog called?", ("Biscuit", "Pepper", "Luna", "Bruno")),
    ("My sister Ada lives in {}.", "Where does Ada live?", ("Lisbon", "Bergen", "Turin", "Krakow")),
    ("I work as a {}.", "What is the work of the user?", ("baker", "nurse", "pilot", "teacher")),
    ("My car is {}.", "What colour is the car?", ("green", "red", "yellow", "white")),
    ("My brother Tom plays the {}.", "What does Tom play?", ("violin", "flute", "harp", "drums")),
    ("I was born in {}.", "In which month was the user born?", ("March", "July", "October", "April")),
    ("My favourite food is {}.", "What is the favourite food of the user?", ("soup", "rice", "bread", "fish")),
    ("My neighbour keeps {}.", "What does the neighbour keep?", ("bees", "goats", "hens", "horses")),
]
"""What the user says about a value, the later question, and the values: one for each conversation."""
SMALL_TALK = [
    ("Is it late?", "It is not late yet."), ("Shall we go on?", "Yes, let us go on."),
    ("Did you sleep well?", "I do not sleep."), ("It is raining again.", "That happens at this time of the year."),
    ("I am a little tired.", "Then take a break."), ("Do you like music?", "I cannot hear it."),
    ("That was a long day.", "Tomorrow may be shorter."), ("What shall I read?", "Take something short."),
]  # fmt: skip
"""The turns that follow, repeated as needed."""


def turn(number: int, conversation: int) -> list[BaseMessage]:
    """A turn of a conversation; the first has number 1."""
    if number <= len(FACTS):
        said, _, values = FACTS[number - 1]
        return [HumanMessage(said.format(values[conversation])), AIMessage("Thank you for telling me.")]
    said, reply = SMALL_TALK[number % len(SMALL_TALK)]
    return [HumanMessage(f"{said} That is turn {number}."), AIMessage(reply)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Conversation(Task):
    """Conversations with different facts, through LangChain's chat model and `TurnMemory`.

    Args:
        shown (`str`, *optional*, defaults to `"memory"`): old turns as `"memory"` and recent ones as text, the
            `"recent"` ones alone, or all as `"text"`. Without memory, the untouched backbone answers.
        turns (`list[int]`, *optional*, defaults to `[10, 20, 40]`): ask for all facts after each of these turns.
        part_tokens (`int`, *optional*): as for `TurnMemory`.
        max_turns, keep_turns (`int`, *optional*, default to `6` and `3`): as for `TurnMemory`.
        max_parts (`int`, *optional*, defaults to `8`): as for `TurnMemory`.
    """

    shown: Literal["memory", "recent", "text"] = "memory"
    turns: tuple[pydantic.PositiveInt, ...] = (10, 20, 40)
    part_tokens: pydantic.PositiveInt | None = None
    max_turns: pydantic.PositiveInt = 6
    keep_turns: pydantic.PositiveInt = 3
    max_parts: pydantic.PositiveInt = 8

    name = "conversation"

    @property
    def dataset(self) -> str:
        """The name of these generated conversations."""
        return "conversations"

    @property
    def settings(self) -> dict[str, Any]:
        """What the model is shown."""
        turns = {"max_turns": self.max_turns, "keep_turns": self.keep_turns, "max_parts": self.max_parts}
        return {"shown": self.shown, "turns": list(self.turns), "part_tokens": self.part_tokens} | turns

    def rows(self, split: str) -> Rows:
        """The conversations as texts, with a question on each fact."""
        return group(
            ("\n".join(message.text for message in conversation(i, max(self.turns))), question, [values[i]])
            for i in range(len(FACTS[0][2]))
            for _, question, values in FACTS
        )

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """See `Task.measure`. `after_N` is the share of facts whose value is in the answer after N turns.
        `prompt_tokens` counts the tokens of the last prompt, including memory vectors.

        Raises:
            TypeError: the model has no memory.
        """
        if not isinstance(answerer.model, PeftModel):
            raise TypeError("The task conversation reads memory states, so it needs the method gradmem.")
        chat = ChatGradMem(pipeline=GradMemPipeline(answerer.model, answerer.tokenizer), max_tokens=self.max_new_tokens)
        memory = TurnMemory.from_chat(
            chat, write_options=WriteOptions(steps=answerer.steps, last_loss=False), part_tokens=self.part_tokens,
            max_turns=self.max_turns, keep_turns=self.keep_turns, max_parts=self.max_parts,
        )  # fmt: skip
        values: dict[str, list[float]] = {}
        answers, tokens = [], 0
        for i in range(len(FACTS[0][2]))[:limit]:
            tokens += len(answerer.tokenizer(self.rows(split)[i]["context"])["input_ids"])
            for turns in self.turns:
                messages = self._messages(memory, conversation(i, turns))
                found = chat.batch([[*messages, HumanMessage(question)] for _, question, _ in FACTS])
                for (_, question, words), message in zip(FACTS, found, strict=True):
                    right = float(words[i].lower() in message.text.lower())
                    values.setdefault(f"after_{turns}", []).append(right)
                    if turns == max(self.turns):
                        values.setdefault("prompt_tokens", []).append(message.usage_metadata["input_tokens"])
                    answers.append({"turns": turns, "query": question, "answer": message.text, "accepted": [words[i]]})
        return Measurement(
            {name: torch.tensor(found, dtype=torch.float64) for name, found in values.items()},
            {"context_tokens": tokens / (len(answers) / len(FACTS) / len(self.turns))},
            {"checkpoint": answerer.checkpoint},
            answers,
        )

    def _messages(self, memory: TurnMemory, messages: list[BaseMessage]) -> list[BaseMessage]:
        """The messages before the question."""
        if self.shown == "memory":
            return memory.shown(messages)
        return messages[memory.cut(messages) :] if self.shown == "recent" else messages


def conversation(number: int, turns: int) -> list[BaseMessage]:
    """The first turns of a conversation."""
    return [message for i in range(turns) for message in turn(i + 1, number)]
