"""Questions on retrieved documents through LangChain: from memory, and from the documents' text in the prompt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, cast

import pydantic
import torch
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, UsageMetadata
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_gradmem import ChatGradMem, GradMemCompressor, create_gradmem_stuff_chain
from peft import PeftModel

from evaluation.data import by_words
from gradmem_adapter import GradMemPipeline, WriteOptions

from .base import OPTIONS, Measurement, QuestionTask

if TYPE_CHECKING:
    from evaluation.run import Answerer


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Rag(QuestionTask):
    """A collection of passages, with the first question on each, asked of as many passages as `states`.

    The passages are found by words, as `MemoryStore.choose` finds them. A LangChain chain answers, as in
    `examples/langchain_rag.py`. Documents are written beforehand, once for all questions.

    Args:
        read (`str`, *optional*, defaults to `"each"`): how found documents are read: from memory, either only the one
            that holds the answer (`"each"`, for adapters that were trained to refuse) or all `"side_by_side"`; or as
            `"text"` in the prompt of the untouched backbone.
        instruction (`str`, *optional*): a text after the question, such as "Answer in a few words."
    """

    read: Literal["each", "side_by_side", "text"] = "each"
    instruction: str = ""

    name = "rag"

    @property
    def settings(self) -> dict[str, Any]:
        """How documents are read."""
        return {"read": self.read} | ({"instruction": self.instruction} if self.instruction else {})

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """See `Task.measure`. In addition to the scores of answers: whether the right passage was `found`,
        `prompt_tokens` (including memory vectors) and `seconds`.

        Raises:
            TypeError: the model has no memory.
        """
        if not isinstance(answerer.model, PeftModel):
            raise TypeError("The task rag measures an adapter and its backbone, so it needs the method gradmem.")
        rows = self.rows(split)[:limit]
        texts, queries = [str(row["context"]) for row in rows], [str(row["queries"][0]) for row in rows]
        reads = [list(read) for read in by_words(texts, queries, states)]
        chat = ChatGradMem(
            pipeline=GradMemPipeline(answerer.model, answerer.tokenizer), max_tokens=self.max_new_tokens,
            max_states=max(states, 8), side_by_side=self.read != "each",
        )  # fmt: skip
        chain = self._chain(chat, answerer.steps, texts)
        values: dict[str, list[float]] = {}
        answers = []
        for query, read, row in zip(queries, reads, rows, strict=True):
            start = time.perf_counter()
            message = chain.invoke({"context": [Document(texts[i]) for i in read], "question": query})
            seconds = time.perf_counter() - start
            answer = message.text.strip()
            found = self.score(answer, row["answers"][0]) | {
                "found": float(texts.index(str(row["context"])) in read),
                "prompt_tokens": float(cast(UsageMetadata, message.usage_metadata)["input_tokens"]),
                "seconds": seconds,
            }
            answers.append({"query": query, "answer": answer, "accepted": row["answers"][0], **found})
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        lengths = [len(ids) for ids in answerer.tokenizer(texts)["input_ids"]]
        return Measurement(
            {name: torch.tensor(found, dtype=torch.float64) for name, found in values.items()},
            {"context_tokens": sum(lengths) / len(lengths), "documents": len(texts)},
            {"checkpoint": answerer.checkpoint},
            answers,
        )

    def _chain(self, chat: ChatGradMem, steps: int, texts: list[str]) -> Runnable[dict[str, Any], AIMessage]:
        """The chain that answers; writes the documents first."""
        question = f"{{context}}\n\n{{question}} {self.instruction}".strip()
        prompt = ChatPromptTemplate.from_messages([("human", question)])
        if self.read == "text":
            return RunnableLambda(_as_text) | prompt | chat
        compressor = GradMemCompressor.from_chat(chat, write_options=WriteOptions(steps=steps, last_loss=False))
        compressor.transform_documents([Document(text) for text in texts])
        whole: Any = RunnableLambda(_as_it_is)  # the message, not only its text, for its token counts
        return create_gradmem_stuff_chain(chat, prompt, compressor=compressor, output_parser=whole)


def _as_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """The documents' text, as LangChain's own chain puts it into the prompt."""
    return {**inputs, "context": "\n\n".join(document.page_content for document in inputs["context"])}


def _as_it_is(message: AIMessage) -> AIMessage:
    return message
