"""Memories over HTTP: written, listed, shown and deleted."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from http.client import HTTPConnection

import httpx
import pytest
from asking import listening, metric, written
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStore
from gradmem_adapter.serve import Limits, create_app
from gradmem_adapter.serve.errors import ApiError
from gradmem_adapter.serve.writes import WriteQueue
from gradmem_adapter.store import files, landing

LONG = tiny_text(30)


def test_a_long_text_is_written_in_segments(client, pipeline, store):
    found = written(client, LONG, name="story")
    segments = list(pipeline.segments(LONG))
    assert [(s["start"], s["end"], s["tokens"]) for s in found["segments"]] == [
        (s.start, s.end, s.tokens) for s in segments
    ]
    assert (found["name"], found["vectors"], found["fidelity"]) == ("story", 6 * len(segments), None)
    assert found["bytes"] == sum(entry.nbytes for entry in store.entries(found["id"]))
    states = pipeline.write([segment.text for segment in segments])
    for segment, expected in zip(found["segments"], states.write_losses.tolist(), strict=True):
        assert segment["write_losses"] == pytest.approx(expected, rel=1e-4)
    assert client.get(f"/v1/memories/{found['id']}").json() == found


def test_fidelity_is_measured_on_request(client, pipeline):
    plain = written(client, LONG)
    measured = written(client, LONG, fidelity=True)
    assert (measured["id"], measured["created"]) == (plain["id"], plain["created"])
    shares = pipeline.write_document(LONG).fidelity(pipeline).greedy.tolist()
    assert [segment["fidelity"] for segment in measured["segments"]] == pytest.approx(shares)
    assert metric(client, "gradmem_written_states_total") == len(shares)
    assert written(client, LONG) == measured


def test_a_file_can_be_uploaded(client):
    response = client.post("/v1/memories", files={"file": ("notes.txt", b"\xef\xbb\xbfw1 w2 w3")}, data={"steps": "2"})
    found = response.json()
    assert (found["name"], found["text_tokens"], len(found["segments"][0]["write_losses"])) == ("notes.txt", 3, 3)
    assert found["id"] == written(client, "w1 w2 w3", steps=2)["id"] != written(client, "w1 w2 w3")["id"]
    refused = client.post("/v1/memories", files={"file": ("notes.txt", b"\xff\xfe")})
    assert (refused.status_code, "UTF-8" in refused.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("form", "param", "said"),
    [
        ({"files": {"file": ("notes.txt", b"")}}, "file", "file: 'notes.txt' is empty"),
        ({"files": {"f": ("notes.txt", b"w1")}}, "f", "Send a file in the field file, .*: got 'f' with a file"),
        ({"files": {"file": (None, "notes.txt")}}, "file", "got .file. without a file"),
        ({"data": {"stpes": "2"}, "files": {"file": ("a", b"w1")}}, "stpes", "stpes: .* did you mean steps?"),
    ],
)
def test_invalid_forms_are_refused(client, form, param, said):
    error = client.post("/v1/memories", **form).json()["error"]
    assert error["param"] == param, error
    assert re.search(said, error["message"]), error


def test_the_list_is_paginated(client):
    ids = sorted(written(client, f"w{i} w1")["id"] for i in range(5))
    first = client.get("/v1/memories", params={"limit": 2}).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = client.get("/v1/memories", params={"after": ids[1]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2:], False)


def test_many_memories_need_no_more_fingerprints_than_one(client, pipeline, monkeypatch):
    ids = [written(client, f"w{i} w1")["id"] for i in range(4)]
    looks, fingerprint = [], pipeline.model.fingerprint
    monkeypatch.setattr(pipeline.model, "fingerprint", lambda: looks.append(1) or fingerprint())

    def looks_of(method, path, **asked):
        looks.clear()
        assert client.request(method, path, **asked).status_code == 200
        return len(looks)

    assert looks_of("GET", "/v1/memories?limit=1") == looks_of("GET", "/v1/memories") == 1
    asked = {"model": "gradmem", "prompt": "w3", "max_tokens": 1}
    one, all_of_them = (looks_of("POST", "/v1/completions", json=asked | {"memory": these}) for these in (ids[:1], ids))
    assert one == all_of_them


def test_a_stored_text_can_be_renamed(client, store):
    first = written(client, LONG, name="one", fidelity=True)
    assert written(client, LONG)["name"] == "one"
    again = written(client, LONG, name="two")
    assert again["name"] == "two"
    assert again | {"name": "one"} == first | {"bytes": again["bytes"]}
    assert client.get("/v1/memories").json()["data"][0]["name"] == "two"
    assert metric(client, "gradmem_written_states_total") == len(first["segments"])
    assert store.verify().ok


def test_a_deleted_memory_is_gone_from_the_disk(client, store):
    identity = written(client, LONG)["id"]
    assert client.delete(f"/v1/memories/{identity}").json()["deleted"]
    assert len(store) == 0
    assert not list((store.path / "states").rglob("*.safetensors"))
    for method in ("GET", "DELETE"):
        assert client.request(method, f"/v1/memories/{identity}").status_code == 404


def test_memories_of_another_model_can_be_deleted(serve, store):
    identity = written(serve(tiny_pipeline(seed=1, num_memory_tokens=6, trained_length=12)), LONG)["id"]
    client = serve()
    assert client.get(f"/v1/memories/{identity}").status_code == 404
    assert client.delete(f"/v1/memories/{identity}").json()["deleted"]
    assert len(store) == 0


def test_stored_memories_are_there_after_a_restart(serve, pipeline, store):
    store.add_document(pipeline, LONG, source="docs/story.txt")
    identity = written(serve(), "w1 w2")["id"]
    again = serve()
    assert [one["id"] for one in again.get("/v1/memories").json()["data"]] == ["docs/story.txt", identity]
    assert len(again.get("/v1/memories/docs/story.txt").json()["segments"]) == 3


def test_a_half_written_text_is_no_memory_and_can_be_completed(serve, pipeline, store, monkeypatch):
    """As a killed server leaves it."""
    client, write_many = serve(), pipeline._write_many

    def killed(texts, **options):
        write_many(texts[:1], **options)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_many", killed)
        client.post("/v1/memories", json={"text": LONG})
    assert len(store) == 1
    assert client.get("/v1/memories").json()["data"] == []
    found = written(client, LONG)
    assert len(found["segments"]) == 3
    assert metric(client, "gradmem_written_states_total") == 3


def test_another_segment_length_makes_other_memories(serve, pipeline, monkeypatch):
    write_many = pipeline._write_many

    def killed(texts, **options):
        write_many(texts[:1], **options)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_many", killed)
        serve().post("/v1/memories", json={"text": LONG})
    again = serve(segment_tokens=6)
    assert len(written(again, LONG, fidelity=True)["segments"]) == 5  # regardless of what was left half written
    assert len(written(serve(), LONG, fidelity=True)["segments"]) == 3
    assert len(again.get("/v1/memories").json()["data"]) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text": " \n "}, "white space"),
        ({"text": ""}, "text: It must have at least 1 character."),
        ({"text": "w1\0w2"}, "The text has a zero byte at position 2, so it is not plain text"),
        ({"text": "w1", "steps": 1000}, "in at most 200 write steps"),
        ({"text": "w1", "lr": -1}, "lr: "),
        ({"text": "w1", "colour": "red"}, "colour: This server does not support it"),
        ({"name": "x"}, "text: Field required"),
    ],
)
def test_invalid_requests_are_refused(client, body, said):
    response = client.post("/v1/memories", json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_text_is_never_treated_as_a_file_name(client, tmp_path):
    path = tmp_path / "secret"
    path.write_text("w9 w9")
    assert written(client, str(path))["text_tokens"] == 1


def test_a_non_finite_state_is_not_stored(client, pipeline, store, monkeypatch):
    write_many = pipeline._write_many

    def diverged(texts, done, **options):
        return write_many(texts, done=lambda rows, states: done(rows, _filled(states)), **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_many", diverged)
        response = client.post("/v1/memories", json={"text": "w1 w2"})
    assert (response.status_code, "diverged" in response.json()["error"]["message"]) == (400, True)
    assert len(store) == 0
    written(client, "w1 w2")


def _filled(states):
    states.vectors.fill_(float("nan"))
    return states


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _not_finite(path):
    tensors, entries = files.read_file(path)
    tensors["scales"].fill_(float("nan"))
    files.write_file(path, tensors, entries)


@pytest.mark.parametrize("damage", [_cut, _not_finite])
def test_a_damaged_state_is_not_read_and_can_be_rewritten(client, store, damage):
    identity = written(client, "w1 w2")["id"]
    (file,) = (store.path / "states").rglob("*.safetensors")
    damage(file)
    asked = {"model": "gradmem", "prompt": "w3", "memory": [identity]}
    for response in (client.get(f"/v1/memories/{identity}"), client.post("/v1/completions", json=asked)):
        assert (response.status_code, response.json()["error"]["code"]) == (500, "memory_damaged")
    with pytest.warns(UserWarning, match="is written again"):
        assert written(client, "w1 w2")["id"] == identity
    assert client.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(serve, chunked):
    client = serve(limits=Limits(body_bytes=1000))
    data = b'{"text": "' + b"w1 " * 1000 + b'"}'
    content = iter([data[:900], data[900:]]) if chunked else data
    response = client.post("/v1/memories", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert client.post("/v1/memories", files={"file": ("a", b"w1 " * 1000)}).status_code == 413


def test_a_body_that_is_neither_json_nor_a_form_is_refused(client):
    plain = client.post("/v1/memories", content=b'{"text": "w1"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    wrong = client.post("/v1/memories", content=b'{"text": ', headers={"Content-Type": "application/json"})
    assert (wrong.status_code, "JSON" in wrong.json()["error"]["message"]) == (400, True)


class TestQueue:
    @pytest.fixture
    def gate(self, pipeline, monkeypatch):
        """An event that lets WRITE continue, with the texts that were written."""
        opened, begun, texts, write_many = threading.Event(), threading.Event(), [], pipeline._write_many

        def gated(these, **options):
            texts.extend(these)
            begun.set()
            assert opened.wait(60)
            return write_many(these, **options)

        monkeypatch.setattr(pipeline, "_write_many", gated)
        opened.begun, opened.texts = begun, texts
        return opened

    def test_each_text_is_written_once_and_the_queue_is_limited(self, pipeline, store, gate):
        app = create_app(pipeline, store.path, limits=Limits(writes=2))
        with listening(app) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(5) as threads:
            same = [threads.submit(written, client, "w1 w2 w3") for _ in range(4)]
            assert gate.begun.wait(60)
            other = threads.submit(written, client, "w4")
            while metric(client, "gradmem_writes_waiting") < 2:
                pass
            refused = client.post("/v1/memories", json={"text": "w5"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "write_queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
            gate.set()
            assert len({future.result()["id"] for future in same}) == 1
            assert other.result()["id"] != same[0].result()["id"]
            assert gate.texts == ["w1 w2 w3", "w4"]
            assert written(client, "w5")["text_tokens"] == 1

    def test_a_write_that_nobody_waits_for_is_not_begun(self, pipeline, store, gate):
        with listening(create_app(pipeline, store.path)) as url, httpx.Client(base_url=url, timeout=60) as client:
            with ThreadPoolExecutor(1) as threads:
                first = threads.submit(written, client, "w1")
                assert gate.begun.wait(60)
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/memories", json={"text": "w2"}, timeout=0.2)
                while metric(client, "gradmem_writes_waiting") > 1:
                    pass
                gate.set()
                first.result()
            written(client, "w3")
        assert gate.texts == ["w1", "w3"]
        assert len(MemoryStore(store.path)) == 2

    def test_a_delete_waits_for_a_write_that_is_being_stored(self, pipeline, store, monkeypatch):
        """A write cannot be stopped in the middle of being stored."""
        land, storing, opened = landing._land, threading.Event(), threading.Event()

        def slow(*args):
            storing.set()
            assert opened.wait(60)
            land(*args)

        monkeypatch.setattr(landing, "_land", slow)
        identity = f"mem_{store.key(pipeline, 'w1 w2')}"
        with (
            listening(create_app(pipeline, store.path, limits=Limits(writes=1))) as url,
            httpx.Client(base_url=url, timeout=60) as client,
            ThreadPoolExecutor(2) as threads,
        ):
            goes_away = HTTPConnection(url.removeprefix("http://"))
            goes_away.request("POST", "/v1/memories", '{"text": "w1 w2"}', {"Content-Type": "application/json"})
            assert storing.wait(60)
            goes_away.close()
            deleted = threads.submit(client.delete, f"/v1/memories/{identity}")
            assert wait([deleted], 0.5).not_done
            assert client.post("/v1/memories", json={"text": "w3"}).status_code == 429
            opened.set()
            assert deleted.result().status_code == 200
            assert client.get("/v1/memories").json()["data"] == []
            assert len(store) == 0
            assert written(client, "w1 w2")["id"] == identity


def test_cancelled_work_stays_in_the_queue_until_its_thread_ends():
    async def run():
        queue, begun, opened = WriteQueue(2), threading.Event(), threading.Event()

        def work(check):
            begun.set()
            assert opened.wait(60)
            check()

        first = asyncio.ensure_future(queue.run("a", work))
        await asyncio.to_thread(begun.wait, 60)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        waiting = asyncio.ensure_future(queue.wait("a"))
        assert len(queue) == 1
        fresh = asyncio.ensure_future(queue.run("a", lambda check: "fresh"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert len(queue) == 2
        with pytest.raises(ApiError, match="2 texts"):
            queue.check_room("b")
        queue.check_room("a")
        opened.set()
        await waiting
        assert await fresh == "fresh"
        await queue.wait("a")
        assert len(queue) == 0
        queue.close()

    asyncio.run(run())
