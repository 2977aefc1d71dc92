"""References: what travels through chains in the place of memory states.

Tensors in messages and documents would fail JSON, caches and checkpoints. A reference is a text of 32 hexadecimal
digits; it is carried by `additional_kwargs["gradmem"]` of a message or `metadata["gradmem"]` of a document, and shown
in the text by a marker. Only what is carried there is ever resolved: a marker in a text that a user typed, a model
echoed or a retriever found is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage

KEY = "gradmem"
REFERENCE = re.compile(r"[0-9a-f]{32}")
Message = TypeVar("Message", bound=BaseMessage)


def marker(reference: str) -> str:
    """How a reference is shown in a text.

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
    references = [value] if isinstance(value, str) else value
    if not isinstance(references, list | tuple) or not all(
        isinstance(reference, str) and REFERENCE.fullmatch(reference) for reference in references
    ):
        raise ValueError(
            f"A reference is a text of 32 hexadecimal digits, as MemoryStateStore.write returns it, got {value!r}."
        )
    return list(references)


def references_of(item: BaseMessage | Document) -> list[str]:
    """The references that the application attached to a message or a document.

    Args:
        item (`BaseMessage` or `Document`): what may carry some.

    Raises:
        ValueError: what it carries is none.
    """
    carrier = item.metadata if isinstance(item, Document) else item.additional_kwargs
    return check_references(carrier.get(KEY, []))


def attach(message: Message, references: Sequence[str]) -> Message:
    """A copy of a message that carries references, beside those that it has.

    Args:
        message (`BaseMessage`): of any kind.
        references (`Sequence[str]`): what `MemoryStateStore.write` returned.
    """
    both = list(dict.fromkeys([*references_of(message), *check_references(list(references))]))
    return message.model_copy(update={"additional_kwargs": message.additional_kwargs | {KEY: both}})


def attach_documents(messages: Iterable[BaseMessage], documents: Iterable[Document]) -> list[BaseMessage]:
    """Messages of which the last human one carries the references of retrieved documents.

    Args:
        messages (`Iterable[BaseMessage]`): with a human message among them.
        documents (`Iterable[Document]`): what `GradMemCompressor` or `GradMemRetriever` returned.

    Raises:
        ValueError: there is no human message to carry them.
    """
    result = list(messages)
    references = [reference for document in documents for reference in references_of(document)]
    for i in reversed(range(len(result))):
        if isinstance(result[i], HumanMessage):
            result[i] = attach(result[i], references)
            return result
    raise ValueError("There is no human message to attach the documents' references to.")


def without_markers(text: str, references: Iterable[str]) -> str:
    """The text without the markers of these references: the memory stands in their place."""
    for reference in references:
        text = text.replace(marker(reference), "")
    return text
