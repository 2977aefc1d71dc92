"""References, which travel through chains in place of memory states.

Tensors in messages and documents would fail JSON, caches and checkpoints. A reference is a text of 32 hexadecimal
digits; it is carried by `additional_kwargs["gradmem"]` of a message or `metadata["gradmem"]` of a document, and shown
in a message's text by a marker. Only what is carried there is ever resolved: a marker in a text that a user typed, a
model echoed or a retriever found stays text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.prompt_values import PromptValue

from gradmem_adapter import MemoryState

KEY = "gradmem"
REFERENCE = re.compile(r"[0-9a-f]{32}")
MARKER = re.compile(r"\[\[gradmem:([0-9a-f]{32})\]\]")
Message = TypeVar("Message", bound=BaseMessage)


def marker(reference: str) -> str:
    """How a reference appears in a text.

    Args:
        reference (`str`): 32 hexadecimal digits.
    """
    return f"[[gradmem:{reference}]]"


def check_references(value: object) -> list[str]:
    """References as a list.

    Args:
        value (`object`): a reference, or a list or tuple of them.

    Raises:
        ValueError: it is neither a reference nor a list of them.
    """
    references: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(reference, str) and REFERENCE.fullmatch(reference) for reference in references):
        told = f"A reference must be 32 hexadecimal digits, as returned by MemoryStateStore.write, got {value!r}."
        if any(isinstance(reference, MemoryState) for reference in references):
            told += " Put a state into the store first: reference = uuid.uuid4().hex; store.mset([(reference, state)])."
        raise ValueError(told)
    return references


def references_of(item: BaseMessage | Document) -> list[str]:
    """The references that the application attached to a message or a document.

    Args:
        item (`BaseMessage` or `Document`): what may carry references. A document's metadata may come from its loader:
            anything under `"gradmem"` that is not a reference of ours is ignored.

    Raises:
        ValueError: a message carries something that is not a reference.
    """
    if isinstance(item, BaseMessage):
        return check_references(item.additional_kwargs.get(KEY, []))
    value = item.metadata.get(KEY)
    found = value.split(" ") if isinstance(value, str) else []
    return found if all(map(REFERENCE.fullmatch, found)) else []


def with_references(document: Document, references: Sequence[str]) -> Document:
    """A copy of a document that carries exactly these references, as one string, because databases refuse lists.

    Args:
        document (`Document`): its text and other metadata are kept.
        references (`Sequence[str]`): the states of its text; if empty, the copy carries none.
    """
    metadata = {name: value for name, value in document.metadata.items() if name != KEY}
    return document.model_copy(update={"metadata": metadata | ({KEY: " ".join(references)} if references else {})})


def attach(message: Message, references: str | Sequence[str]) -> Message:
    """A copy of a message that carries references in addition to those it has.

    Args:
        message (`BaseMessage`): a message of any kind.
        references (`str` or `Sequence[str]`): one reference, or several as returned by `MemoryStateStore.write`.
    """
    given = [references] if isinstance(references, str) else list(references)
    both = list(dict.fromkeys([*references_of(message), *check_references(given)]))
    return message.model_copy(update={"additional_kwargs": message.additional_kwargs | {KEY: both}})


def attach_documents(
    messages: str | PromptValue | Iterable[BaseMessage], documents: Iterable[Document]
) -> list[BaseMessage]:
    """Messages whose last human message carries the references of retrieved documents.

    Args:
        messages (`str`, `PromptValue` or `Iterable[BaseMessage]`): a question, the output of a prompt, or messages that
            include a human one.
        documents (`Iterable[Document]`): as returned by `GradMemCompressor` or `GradMemRetriever`.

    Raises:
        ValueError: there is no human message to carry them.
    """
    if isinstance(messages, str):
        messages = [HumanMessage(messages)]
    result = messages.to_messages() if isinstance(messages, PromptValue) else list(messages)
    references = []
    for document in documents:
        references += references_of(document)
        if not references_of(document):
            warnings.warn(
                "An attached document carries no reference, so the model sees it only if its text is in the prompt. "
                "Write documents first: GradMemCompressor.compress_documents, or GradMemRetriever.",
                stacklevel=2,
            )
    for i in reversed(range(len(result))):
        if isinstance(result[i], HumanMessage):
            result[i] = attach(result[i], references)
            return result
    raise ValueError("There is no human message to attach the documents' references to: pass a HumanMessage.")


def without_markers(text: str, references: Iterable[str]) -> str:
    """The text without the markers of these references: the model reads their memory instead."""
    known = set(references)
    return MARKER.sub(lambda found: "" if found[1] in known else found[0], text)
