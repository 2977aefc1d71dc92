"""GradMem in LangChain: long contexts written once into memory states, and read many times inside chains.

`langchain_gradmem.middleware` (agents) needs `langchain`, and `langchain_gradmem.memory` (classic chains) needs
`langchain-classic`; they are imported by themselves.
"""

from .chat_message_histories import GradMemChatMessageHistory
from .chat_models import ChatGradMem
from .document_compressors import GradMemCompressor
from .references import attach, attach_documents, marker, references_of
from .retrievers import GradMemRetriever
from .stores import MemoryStateStore, UnknownReferenceError
from .writer import MemoryWriter, TurnMemory

__all__ = [
    "ChatGradMem",
    "GradMemChatMessageHistory",
    "GradMemCompressor",
    "GradMemRetriever",
    "MemoryStateStore",
    "MemoryWriter",
    "TurnMemory",
    "UnknownReferenceError",
    "attach",
    "attach_documents",
    "marker",
    "references_of",
]
