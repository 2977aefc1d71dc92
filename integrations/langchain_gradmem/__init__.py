"""GradMem in LangChain: long contexts written once into memory states, and read many times inside chains.

`langchain_gradmem.middleware` (agents) and `langchain_gradmem.classic` need `langchain` and `langchain-classic`; they
are imported by themselves.
"""

from .chat import ChatGradMem
from .compressor import GradMemCompressor
from .conversation import TurnMemory
from .history import GradMemChatMessageHistory
from .references import attach, attach_documents, marker, references_of
from .retriever import GradMemRetriever
from .store import MemoryStateStore, UnknownReferenceError

__all__ = [
    "ChatGradMem",
    "GradMemChatMessageHistory",
    "GradMemCompressor",
    "GradMemRetriever",
    "MemoryStateStore",
    "TurnMemory",
    "UnknownReferenceError",
    "attach",
    "attach_documents",
    "marker",
    "references_of",
]
