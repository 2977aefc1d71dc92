"""What memory is trained and measured on: a task is one class in one file, imported and entered here."""

from .answerable import Answerable
from .babi import Babi
from .base import Measurement, Task
from .continuation import Continuation
from .kv_retrieval import KVRetrieval
from .long_documents import LongDocuments
from .passages import Passages
from .plain_text import PlainText
from .reconstruction import Reconstruction
from .short_squad import ShortSquad

TASKS: dict[str, type[Task]] = {
    Answerable.name: Answerable,
    Babi.name: Babi,
    Continuation.name: Continuation,
    KVRetrieval.name: KVRetrieval,
    LongDocuments.name: LongDocuments,
    Passages.name: Passages,
    PlainText.name: PlainText,
    Reconstruction.name: Reconstruction,
    ShortSquad.name: ShortSquad,
}

__all__ = [
    "TASKS", "Answerable", "Babi", "Continuation", "KVRetrieval", "LongDocuments", "Measurement", "Passages",
    "PlainText", "Reconstruction", "ShortSquad", "Task",
]  # fmt: skip
