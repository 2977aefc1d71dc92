"""Many memory states on disk, with an index."""

from gradmem_adapter.store.choose import Choice, search_scores
from gradmem_adapter.store.embedding import Embedding
from gradmem_adapter.store.entry import Entry, state_key, write_identity
from gradmem_adapter.store.errors import MemoryStoreError, UnknownStateError
from gradmem_adapter.store.memory_store import MemoryStore
from gradmem_adapter.store.upkeep import Report, Stats

__all__ = [
    "Choice",
    "Embedding",
    "Entry",
    "MemoryStore",
    "MemoryStoreError",
    "Report",
    "Stats",
    "UnknownStateError",
    "search_scores",
    "state_key",
    "write_identity",
]
