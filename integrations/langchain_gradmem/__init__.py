"""GradMem in LangChain: long contexts written once into memory states, and read many times inside chains.

`langchain_gradmem.middleware` (agents) needs `langchain`, and `langchain_gradmem.memory` (classic chains) needs
`langchain-classic`; they are imported by themselves.
"""

from .chains import create_gradmem_stuff_chain
from .chat_message_histories import GradMemChatMessageHistory, StoredChatMessageHistory
from .chat_models import ChatGradMem
from .document_compressors import GradMemCompressor
from .references import attach, attach_documents, marker, references_of
from .retrievers import GradMemRetriever
from .stores import MemoryStateStore
from .turns import TurnMemory
from .writer import MemoryWriter

__all__ = [
    "ChatGradMem",
    "GradMemChatMessageHistory",
    "GradMemCompressor",
    "GradMemRetriever",
    "MemoryStateStore",
    "MemoryWriter",
    "StoredChatMessageHistory",
    "TurnMemory",
    "attach",
    "attach_documents",
    "create_gradmem_stuff_chain",
    "marker",
    "references_of",
]
