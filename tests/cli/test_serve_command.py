"""`gradmem serve`: what it serves, and when it refuses to start."""

import socket

import pytest
from commands import invoke
from starlette.testclient import TestClient

from gradmem_adapter import serve
from gradmem_adapter.export.vllm import VLLMReader


@pytest.fixture
def started(monkeypatch):
    """The servers that would have been started."""
    calls = []
    monkeypatch.setattr(serve, "run", lambda app, **options: calls.append((app, options)))
    return calls


def test_the_server_gets_its_host_port_and_memories(checkpoint, tmp_path, started):
    result = invoke("serve", checkpoint, "--store", tmp_path / "store", "--port", 0, "--segment-tokens", 8)
    assert result.exit_code == 0, result.output
    assert f"checkpoint with the memories in {tmp_path / 'store'}" in " ".join(result.output.split())
    ((app, options),) = started
    assert (options["host"], options["port"]) == ("127.0.0.1", 0)
    with TestClient(app, "http://127.0.0.1") as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "checkpoint"
        assert len(client.post("/v1/memories", json={"text": "w1 w2 w3 " * 5}).json()["segments"]) == 2


def test_an_invalid_segment_length_is_refused_before_it_listens(checkpoint, tmp_path, started):
    refused = invoke("serve", checkpoint, "--store", tmp_path / "store", "--segment-tokens", 0)
    assert (refused.exit_code, "got 0" in refused.output, started) == (2, True, [])


def test_a_port_in_use_is_refused_before_the_model_is_opened(tmp_path, started):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = invoke("serve", tmp_path / "none", "--store", tmp_path / "store", "--port", port)
    assert (refused.exit_code, started) == (2, [])
    assert f"listen at 127.0.0.1, port {port}: Address already in use. Pass another --port" in " ".join(
        refused.stderr.split()
    )


def test_an_adapter_of_unknown_trained_length_is_served_but_writes_nothing(checkpoint, tmp_path, started):
    store = tmp_path / "store"
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    options = ("--checkpoint", checkpoint, "--segment-tokens", 8, "--device", "cpu")
    assert invoke("write", tmp_path / "a.txt", "--store", store, *options).exit_code == 0
    result = invoke("serve", checkpoint, "--store", store)
    assert (result.exit_code, len(started)) == (0, 1), result.output
    said = (
        "The adapter does not say its trained length, so the number of tokens that one memory state can hold is unknown"
    )
    assert f"{said}: pass --segment-tokens. Without it, this server writes no texts" in " ".join(result.stderr.split())
    ((app, _),) = started
    with TestClient(app, "http://127.0.0.1") as client:
        (memory,) = client.get("/v1/memories").json()["data"]
        body = {"model": "checkpoint", "memory": [memory["id"]], "prompt": "w1", "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        for stream in (False, True):
            refused = client.post("/v1/memories", json={"text": "w1 w2", "stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_segment_tokens")
            told = refused.json()["error"]["message"]
            assert told.startswith(f"{said}: this server writes no texts")
            assert told.endswith("gradmem serve --segment-tokens.")


def test_other_hosts_than_localhost_need_keys(checkpoint, tmp_path, started):
    arguments = ("serve", checkpoint, "--store", tmp_path / "store", "--host", "0.0.0.0", "--segment-tokens", 8)
    refused = invoke(*arguments)
    assert (refused.exit_code, "Pass --keys FILE" in refused.output, started) == (2, True, [])
    (tmp_path / "keys").write_text("anna aaaaaaaaaaaaaaaa")
    for _ in range(2):
        assert invoke(*arguments, "--keys", tmp_path / "keys").exit_code == 0
        with TestClient(started.pop()[0]) as client:
            assert client.get("/v1/models").status_code == 401
            headers = {"Authorization": "Bearer aaaaaaaaaaaaaaaa"}
            body = {"file": ("w.txt", b"w1 w2")}
            assert client.post("/v1/memories", files=body, headers=headers).status_code == 200


def test_vllm_can_be_the_reader(checkpoint, tmp_path, started, monkeypatch):
    made = []
    monkeypatch.setattr(serve, "create_app", lambda pipeline, *rest, **more: made.append(pipeline))
    arguments = ("serve", checkpoint, "--store", tmp_path / "store", "--segment-tokens", 8, "--reader", "vllm")
    assert "--url needs --reader vllm" in invoke(*arguments).output
    result = invoke(*arguments, "--url", "http://localhost:9", "--engine-model", "memory", "--engine-key", "secret")
    assert result.exit_code == 0, result.output
    (pipeline,) = made
    assert isinstance(pipeline.reader, VLLMReader)
    reader = pipeline.reader
    assert (reader.engine, reader.name, reader.api_key) == ("http://localhost:9", "memory", "secret")


def test_a_directory_with_other_files_is_not_a_store(checkpoint, tmp_path, started):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "letter.txt").write_text("Dear")
    refused = invoke("serve", checkpoint, "--store", tmp_path / "store")
    assert (refused.exit_code, "not a memory store" in refused.output, started) == (2, True, [])


def test_the_stores_of_tenants_are_checked_like_others(checkpoint, tmp_path, started):
    (tmp_path / "keys").write_text("anna aaaaaaaaaaaaaaaa")
    folder = tmp_path / "store" / "tenants" / "anna"
    folder.mkdir(parents=True)
    (folder / "letter.txt").write_text("Dear")
    command = ("serve", checkpoint, "--store", tmp_path / "store", "--keys", tmp_path / "keys", "--segment-tokens", 8)
    assert "not a memory store" in invoke(*command).stderr
    (folder / "letter.txt").unlink()
    (folder / "index.sqlite").write_bytes(bytes(999))
    refused = invoke(*command)
    assert (refused.exit_code, "is damaged" in refused.stderr, started) == (2, True, [])
    (folder / "index.sqlite").unlink()
    assert invoke(*command).exit_code == 0
    (tmp_path / "store" / "letter.txt").write_text("Dear")
    assert "not a memory store" in invoke(*command).stderr


def test_memories_that_no_key_can_see_give_a_warning(checkpoint, tmp_path, started):
    store, keys = tmp_path / "store", tmp_path / "keys"
    keys.write_text("anna aaaaaaaaaaaaaaaa")
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    options = ("--checkpoint", checkpoint, "--segment-tokens", 8, "--device", "cpu")
    assert invoke("write", tmp_path / "a.txt", "--store", store, *options).exit_code == 0
    result = invoke("serve", checkpoint, "--store", store, "--keys", keys, "--segment-tokens", 8)
    assert (result.exit_code, len(started)) == (0, 1), result.output
    said = f"No client sees 1 memory in {store}. They were stored without keys."
    assert said in " ".join(result.stderr.split())
