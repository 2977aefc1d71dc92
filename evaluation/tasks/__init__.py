"""The tasks that memory is trained and measured on: each is a class in its own file, registered here."""

from .answerable import Answerable
from .babi import Babi
from .base import Measurement, Task
from .continuation import Continuation
from .conversation import Conversation
from .kv_retrieval import KVRetrieval
from .left_out import LeftOut
from .long_documents import LongDocuments
from .passages import Passages
from .plain_text import PlainText
from .rag import Rag
from .reconstruction import Reconstruction
from .short_squad import ShortSquad

TASKS: dict[str, type[Task]] = {
    Answerable.name: Answerable,
    Babi.name: Babi,
    Continuation.name: Continuation,
    Conversation.name: Conversation,
    KVRetrieval.name: KVRetrieval,
    LeftOut.name: LeftOut,
    LongDocuments.name: LongDocuments,
    Passages.name: Passages,
    PlainText.name: PlainText,
    Rag.name: Rag,
    Reconstruction.name: Reconstruction,
    ShortSquad.name: ShortSquad,
}

__all__ = [
    "TASKS", "Answerable", "Babi", "Continuation", "Conversation", "KVRetrieval", "LeftOut", "LongDocuments",
    "Measurement", "Passages", "PlainText", "Rag", "Reconstruction", "ShortSquad", "Task",
]  # fmt: skip
