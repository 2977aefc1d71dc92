"""What memory is trained and measured on: a task is one class in one file, imported and entered here."""

from .babi import Babi
from .base import Measurement, Task
from .kv_retrieval import KVRetrieval
from .passages import Passages
from .plain_text import PlainText
from .reconstruction import Reconstruction

TASKS: dict[str, type[Task]] = {
    Babi.name: Babi,
    KVRetrieval.name: KVRetrieval,
    Passages.name: Passages,
    PlainText.name: PlainText,
    Reconstruction.name: Reconstruction,
}

__all__ = ["TASKS", "Babi", "KVRetrieval", "Measurement", "Passages", "PlainText", "Reconstruction", "Task"]
