"""Servers on tiny models: apps that are asked directly, and one that listens."""

import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[1])])  # for `asking` and `tiny_pipeline`

from asking import listening
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStore
from gradmem_adapter.serve import create_app


@pytest.fixture(scope="session")
def pipeline():
    return tiny_pipeline(num_memory_tokens=6, trained_length=12)


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path / "store")


@pytest.fixture
def serve(pipeline, store):
    """Makes a client of an app."""
    clients = []

    def make(own=pipeline, **options):
        client = TestClient(create_app(own, store.path, **options), "http://127.0.0.1", raise_server_exceptions=False)
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serve):
    return serve()


@pytest.fixture
def live(pipeline, store):
    """The address of a server."""
    with listening(create_app(pipeline, store.path)) as url:
        yield url
