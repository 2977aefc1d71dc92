import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stores import NAMES, PLACES, TEXTS, tiny_pipeline

from gradmem_adapter.store import MemoryStore


@pytest.fixture(scope="session")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path / "store", dtype="float32")


@pytest.fixture
def keys(store, pipeline):
    """The keys of four texts in `store`, from three sources."""
    return store.add(pipeline, TEXTS, sources=NAMES, offsets=PLACES)
