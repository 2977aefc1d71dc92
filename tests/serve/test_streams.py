"""What the API streams about memories: write steps, recitals, and how far an answer is supported."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from asking import listening, running, written
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter.serve import Limits, create_app

LONG = tiny_text(30)


def events(response):
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_each_write_step_is_streamed(client):
    begun, *steps, memory = events(client.post("/v1/memories", json={"text": LONG, "steps": 2, "stream": True}))
    assert memory == client.get(f"/v1/memories/{memory['id']}").json()
    assert (begun["object"], begun["id"], memory["object"]) == ("memory.begun", memory["id"], "memory")
    assert begun["segments"] == [{key: one[key] for key in ("start", "end", "tokens")} for one in memory["segments"]]
    assert {step["object"] for step in steps} == {"memory.step"}
    for i, segment in enumerate(memory["segments"]):
        told = [(step["step"], one["write_loss"]) for step in steps for one in step["segments"] if one["segment"] == i]
        assert [step for step, _ in told] == [0, 1, 2]
        assert [loss for _, loss in told] == pytest.approx(segment["write_losses"])
    assert all(0 <= one["recovered"] <= 1 for step in steps for one in step["segments"])
    assert events(client.post("/v1/memories", json={"text": LONG, "steps": 2, "stream": True})) == [memory]


def test_a_refused_text_is_an_event_or_a_status(client):
    (error,) = events(client.post("/v1/memories", json={"text": " \n", "stream": True}))
    assert "white space" in error["error"]["message"]
    assert client.post("/v1/memories", json={"text": "", "stream": True}).status_code == 400


def test_a_full_queue_is_a_status_and_not_a_stream(serve):
    client = serve(limits=Limits(writes=0))
    response = client.post("/v1/memories", json={"text": "w1", "stream": True})
    assert (response.status_code, "Retry-After" in response.headers) == (429, True)


def test_leaving_a_stream_stops_the_write(pipeline, store):
    with listening(create_app(pipeline, store.path)) as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"text": LONG, "steps": 200, "stream": True}
        with client.stream("POST", "/v1/memories", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
        while "gradmem_writes_waiting 0.0" not in client.get("/metrics").text:
            pass
        written(client, "w1 w2")
    assert len(store) == 1


def test_a_recital_equals_the_reconstruction(client, pipeline, store):
    memory = written(client, LONG)
    text = list(pipeline.segments(LONG))[1].text
    state = store.get([entry.key for entry in store.entries(memory["id"])])[1]
    ids = pipeline.tokenizer(text)["input_ids"]
    decoded = pipeline.model.reconstruct(state)[0].tolist()
    body = {"memory": memory["id"], "segment": 1}
    whole = client.post("/v1/recitals", json=body).json()
    assert whole["text"] == pipeline.reconstruct(state)[0]
    right = [a == b for a, b in zip(decoded, ids, strict=True)]
    assert (whole["tokens"], whole["right_tokens"]) == (len(ids), sum(right))
    assert "".join(piece["text"] for piece in whole["pieces"]) == whole["text"]
    assert sum(piece["right"] for piece in whole["pieces"]) <= sum(right)
    *pieces, last = events(client.post("/v1/recitals", json=body | {"stream": True}))
    assert last == whole
    assert [{"object": "recital.piece"} | piece for piece in whole["pieces"]] == pieces
    assert len(client.post("/v1/recitals", json=body | {"max_tokens": 2}).json()["text"].split()) <= 2


@pytest.mark.parametrize(
    ("more", "status", "said"), [({"segment": 9}, 400, "3 segments"), ({"memory": "mem_0"}, 404, "no memory")]
)
def test_invalid_recitals_are_refused(client, more, status, said):
    body = {"memory": written(client, LONG)["id"], "stream": True}
    response = client.post("/v1/recitals", json=body | more)
    assert (response.status_code, said in response.json()["error"]["message"]) == (status, True)


def test_a_memory_shows_its_text_and_the_size_of_its_kv_cache(client):
    memory = written(client, LONG)
    assert (
        memory["kv_bytes"] == memory["text_tokens"] * 2 * 2 * 2 * 8 * 4
    )  # layers, keys and values, heads, width, bytes
    found = client.get(f"/v1/memories/{memory['id']}", params={"text": True}).json()
    assert [LONG[one["start"] : one["end"]] for one in found["segments"]] == [one["text"] for one in found["segments"]]
    assert "text" not in memory["segments"][0]


def test_answers_come_with_their_support(serve, store):
    own = tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3")
    client = serve(own)
    card = client.get("/v1/models").json()["data"][0]["memory"]
    assert card == {"vectors": 6, "write_steps": 1, "trained_length": 12, "refusal": "w3 w3", "dtype": "float32"}
    ids = [written(client, text)["id"] for text in ("w1 w2 w3", "w6 w7 w8 w9")]
    question = [{"role": "user", "content": "w4 w5"}]
    states = store.get([entry.key for identity in ids for entry in store.entries(identity)])
    scores = own.support(question, memory=states)
    body = {"model": "gradmem", "messages": question, "max_tokens": 3, "support": True}
    for memory, expected in ((ids, max(scores)), (ids[:1], scores[0])):
        whole = client.post("/v1/chat/completions", json=body | {"memory": memory}).json()
        assert whole["support"] == pytest.approx(expected, rel=1e-4)
        first, *_ = events(client.post("/v1/chat/completions", json=body | {"memory": memory, "stream": True}))
        assert first["support"] == whole["support"]
    assert client.post("/v1/chat/completions", json=body).json()["support"] is None
    assert "support" not in client.post("/v1/chat/completions", json=body | {"support": False}).json()


def test_an_adapter_that_does_not_refuse_has_no_support(client):
    body = {"model": "gradmem", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 3, "support": True}
    assert (
        client.post("/v1/chat/completions", json=body | {"memory": [written(client, "w1")["id"]]}).json()["support"]
        is None
    )


def test_the_page_needs_no_key_and_nothing_from_elsewhere(serve):
    from gradmem_adapter.serve import Tenants

    client = serve(tenants=Tenants({"a" * 16: "anna"}))
    types = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css", "/icon.svg": "image/svg+xml"}
    for path, kind in types.items():
        response = client.get(path)
        assert response.headers["Content-Type"].partition(";")[0] == kind
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "http" not in response.text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_stopping_server_tells_its_clients_and_ends(pipeline, store, stream):
    """What it was writing is stored completely or not at all."""
    app = create_app(pipeline, store.path, limits=Limits(write_steps=10**9))
    with running(app) as (url, server), httpx.Client(base_url=url, timeout=120) as client:
        kept = written(client, "w1 w2 w3")
        body = {"text": LONG, "steps": 10**9, "stream": stream}
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(client.post, "/v1/memories", json=body)
            while "gradmem_writes_waiting 0.0" in client.get("/metrics").text:
                pass
            server.should_exit = True
            response = waiting.result()
    if stream:
        assert response.status_code == 200
        error = events(response)[-1]["error"]
    else:
        assert (response.status_code, "Retry-After" in response.headers) == (503, True)
        error = response.json()["error"]
    assert (error["code"], "The server is stopping" in error["message"]) == ("server_stopping", True)
    assert [entry.source for entry in store.entries()] == [kept["id"]]
    report = store.verify()
    assert (report.ok, report.leftovers) == (True, ())


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/memories"])
def test_a_stopping_server_does_not_wait_for_the_rest_of_a_request(pipeline, store, capfd, path, kind):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 99\r\n\r\n"
    with running(create_app(pipeline, store.path)) as (url, server):
        server.config.timeout_graceful_shutdown = 600
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=300) as client:
            client.sendall(f"{head}--x\r\n".encode())
            while not server.server_state.tasks:
                time.sleep(0.01)
            server.should_exit = True
            assert client.recv(1) == b""
    assert "Traceback" not in capfd.readouterr().err
