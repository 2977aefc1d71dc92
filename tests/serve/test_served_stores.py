"""Memories in the directories of tenants that nobody can see, and the warnings about them."""

import shutil
import subprocess

import pytest
from asking import written
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStore
from gradmem_adapter.serve import Limits, Tenants, store_of, unseen

KEY = "a" * 16
ANNA = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def filled(serve, pipeline, store):
    """A store with two memories that were written without keys."""
    client = serve()
    return [written(client, text)["id"] for text in ("w1 w2 w3", "w4 w5")]


def told(pipeline, store, tenants):
    return list(unseen(store.path, tenants, pipeline.model.fingerprint()))


def seen(serve, tenants):
    return {one["id"] for one in serve(tenants=tenants).get("/v1/memories", headers=ANNA).json()["data"]}


def test_memories_stored_without_keys_can_be_given_to_a_tenant(serve, pipeline, store, filled):
    tenants = Tenants({KEY: "anna"})
    assert told(pipeline, store, Tenants()) == []
    assert seen(serve, tenants) == set()
    (line,) = told(pipeline, store, tenants)
    assert line.startswith(f"No client sees 2 memories in {store.path}. They were stored without keys.")
    subprocess.run(line.partition("no server is running: ")[2].replace("NAME", "anna"), shell=True, check=True)
    assert told(pipeline, store, tenants) == []
    assert seen(serve, tenants) == set(filled)
    assert store_of(store.path, "anna").verify().ok


def test_a_tenant_with_memories_can_get_more(serve, pipeline, store, filled):
    """As docs/serving.md describes it."""
    tenants = Tenants({KEY: "anna"})
    client = serve(tenants=tenants)
    own = client.post("/v1/memories", json={"text": "w6"}, headers=ANNA).json()["id"]
    shutil.copytree(store.path / "states", store.path / "tenants/anna/states", dirs_exist_ok=True)
    assert store_of(store.path, "anna").rebuild().ok
    assert seen(serve, tenants) == {*filled, own}


def test_a_tenant_named_local_sees_memories_stored_without_keys(serve, pipeline, store, filled):
    tenants = Tenants({KEY: "local"})
    assert told(pipeline, store, tenants) == []
    assert seen(serve, tenants) == set(filled)


def test_tenants_without_a_key_give_a_warning(serve, pipeline, store):
    serve(tenants=Tenants({KEY: "anna"})).post("/v1/memories", json={"text": "w1"}, headers=ANNA)
    (line,) = told(pipeline, store, Tenants({KEY: "bert"}))
    assert "No client sees 1 memory in" in line
    assert "add a line with anna and a key" in line
    (line,) = told(pipeline, store, Tenants())
    assert "They belong to the tenant 'anna', which needs a key: pass --keys FILE." in line


def test_states_of_another_model_give_a_warning(pipeline, store, filled):
    store.add(tiny_pipeline(seed=1), ["w1 w2"])
    (line,) = told(pipeline, store, Tenants())
    assert line.startswith(f"Another model wrote 1 of 3 memory states in {store.path}: clients do not see these.")


def test_an_unreadable_store_gives_a_warning(pipeline, store):
    other = store_of(store.path, "anna")
    other.path.mkdir(parents=True)
    other.index.path.write_bytes(bytes(999))
    (line,) = told(pipeline, MemoryStore(store.path), Tenants())
    assert line.startswith("The store of 'anna' cannot be read: The index")


@pytest.mark.parametrize(("text", "steps"), [("w1 w2 w3. " * 4 + "w4 w5", None), ("w1 w2 w3. " * 5, 1)])
def test_a_rewritten_source_shows_its_latest_text(client, pipeline, store, text, steps):
    store.add_document(pipeline, "w1 w2 w3. " * 5, source="notes.txt")
    before = client.get("/v1/memories/notes.txt").json()
    store.add_document(pipeline, text, source="notes.txt", steps=steps)
    (after,) = client.get("/v1/memories").json()["data"]
    found = client.get("/v1/memories/notes.txt", params={"text": True}).json()
    assert " ".join(segment["text"] for segment in found["segments"]) == text.strip()
    assert (after["id"], found != before) == ("notes.txt", True)
    asked = {"model": "gradmem", "prompt": "w3", "memory": ["notes.txt"]}
    answer = client.post("/v1/completions", json=asked).json()
    places = {(segment["start"], segment["end"]) for segment in found["segments"]}
    assert {(place["start"], place["end"]) for place in answer["memory"]} <= places


def test_a_half_written_text_hides_no_memory(client, pipeline, store):
    parts = [f"w1 w2 w3 w{i}" for i in (4, 5, 6, 7)]
    places = [(12 * i, 12 * i + 11) for i in range(4)]
    store.add(pipeline, parts, sources="part", offsets=places, metadata=[{"segments": 9}] * 4)
    identity = written(client, "w1 w8 w9 w10 w11 w12")["id"]
    answer = client.post("/v1/completions", json={"model": "gradmem", "prompt": "w1 w2 w3", "memory": "auto"}).json()
    assert [place["id"] for place in answer["memory"]] == [identity]


def test_only_segments_of_the_latest_text_are_read(client, pipeline, store):
    text = " ".join(f"w1 w2 w3 w{i}." for i in range(4, 34))
    for again in (text, f"w1. {text}"):
        store.add_document(pipeline, again, source="notes.txt")
    memory = client.get("/v1/memories/notes.txt").json()
    asked = {"model": "gradmem", "prompt": "w1", "memory": ["notes.txt"]}
    places = client.post("/v1/completions", json=asked).json()["memory"]
    assert len(places) == Limits().states < len(memory["segments"])
    assert {place["start"] for place in places} <= {segment["start"] for segment in memory["segments"]}
