"""`gradmem serve` as a process: what a kill leaves, and how it ends when asked to."""

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest
from asking import written
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, load_backbone, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path):
    """The command that starts a server on a checkpoint."""
    for part in (tiny(max_position_embeddings=600), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "backbone")
    model, tokenizer = load_backbone(str(tmp_path / "backbone"))
    config = GradMemConfig(num_memory_tokens=6, write_steps=1, write_lr=0.3, trained_length=12)
    save_checkpoint(get_peft_model(model, config), tokenizer, tmp_path / "tiny")
    return [sys.executable, "-m", "gradmem_adapter.cli", "serve", tmp_path / "tiny", "--store", tmp_path / "store"]


@contextmanager
def started(command):
    """A running server process, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        subprocess.Popen([*map(str, command), "--port", str(port)]) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            while True:
                assert process.poll() is None, "the server ended"
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            yield process, client
        finally:
            process.kill()


def answer(client, identity):
    body = {"model": "tiny", "prompt": "w1 w2", "memory": [identity], "max_tokens": 8}
    return client.post("/v1/completions", json=body).json()["choices"][0]["text"]


def test_a_kill_loses_no_memory(command):
    kept = {}
    with started(command) as (process, client), ThreadPoolExecutor(4) as threads:

        def write(number):
            with suppress(httpx.HTTPError):
                identity = written(client, f"w{number} w1 " * 12)["id"]
                kept[identity] = answer(client, identity)

        futures = [threads.submit(write, number) for number in range(40)]
        while len(kept) < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for future in futures:
            future.result()
    assert len(kept) < 40
    with started(command) as (process, client):
        assert kept.keys() <= {one["id"] for one in client.get("/v1/memories").json()["data"]}
        assert {identity: answer(client, identity) for identity in kept} == kept


def test_a_server_finishes_its_streams_when_it_is_stopped(command):
    with started(command) as (process, client):
        body = {"model": "tiny", "prompt": "w1 w2", "max_tokens": 500, "stream": True}
        whole = client.post("/v1/completions", json=body).text
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            got = [next(lines)]
            process.send_signal(signal.SIGTERM)
            got += lines
        assert got[-2] == "data: [DONE]"
        assert texts(got) == texts(whole.splitlines())
        assert process.wait(60) == -signal.SIGTERM


def test_a_server_interrupts_its_writes_when_it_is_stopped(command):
    """The client is told, and the server does not wait; the same text can be written after a restart."""
    body = {"text": "w1 w2 w3 w4 " * 600, "steps": 200, "stream": True}  # minutes of work
    with started(command) as (process, client), client.stream("POST", "/v1/memories", json=body) as response:
        lines = response.iter_lines()
        got = [next(lines)]
        process.send_signal(signal.SIGTERM)
        got += [line for line in lines if line.startswith("data: ")]
        assert got[-1] == "data: [DONE]"
        assert json.loads(got[-2].removeprefix("data: "))["error"]["code"] == "server_stopping"
        assert process.wait(60) == -signal.SIGTERM
    with started(command) as (process, client):
        assert client.get("/v1/memories").json()["data"] == []
        assert written(client, body["text"], steps=1)["segments"]


def texts(lines):
    return [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
