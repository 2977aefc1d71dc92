"""Full or read-only file systems, and files that may not grow: what is there stays as it is."""

import errno
import json
import os
import resource
import subprocess
from contextlib import suppress

import pytest
import torch
from adapters import make
from commands import invoke
from starlette.testclient import TestClient
from tiny import rows, tiny, tiny_text, tiny_tokenizer
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryState, load_checkpoint, save_checkpoint, serve
from gradmem_adapter.store import MemoryStore
from gradmem_adapter.training import GradMemTrainer, GradMemTrainingArguments

CONFIG = {"lora_config": {"r": 2, "target_modules": ["q_proj"]}}


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root may mount a file system, and in some containers not even root")


def fill_up(folder):
    """Leaves no room on a file system."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def small(tmp_path):
    """A file system of 256 kB."""
    (tmp_path / "small").mkdir()
    mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "small")
    yield tmp_path / "small"
    subprocess.run(["umount", "--lazy", tmp_path / "small"], check=True)


@pytest.fixture
def short():
    """No file may be larger than 30 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(size):
    return MemoryState(torch.ones(1, 1, size), torch.tensor([1]), torch.zeros(1, 1), "model")


def files(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(path, number, save):
    before = files(path.parent)
    with pytest.raises(OSError, match="cannot be written") as error:
        save()
    assert (error.value.errno, error.value.filename) == (number, str(path))
    assert files(path.parent) == before


def save_state(folder, number):
    state(100).save(folder / "states")
    refused(folder / "states", number, lambda: state(80_000).save(folder / "states"))
    refused(folder / "new", number, lambda: state(80_000).save(folder / "new"))
    state(200).save(folder / "states")
    assert MemoryState.load(folder / "states") == state(200)


def test_a_full_disk_leaves_states_as_they_are(small):
    save_state(small, errno.ENOSPC)


def test_a_limit_on_file_size_leaves_states_as_they_are(tmp_path, short):
    save_state(tmp_path, errno.EFBIG)


@pytest.mark.parametrize("free", range(0, 60_000, 12_000))
def test_a_disk_that_fills_up_during_a_save_leaves_the_checkpoint(small, free):
    """Wherever in the save the disk fills up."""
    path = small / "saved"
    save_checkpoint(make(**CONFIG), tiny_tokenizer(), path)
    left = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
    (small / "filled").write_bytes(bytes(left - free))
    try:
        refused(path, errno.ENOSPC, lambda: save_checkpoint(make(**CONFIG), tiny_tokenizer(), path))
    except BaseException:
        assert free > 30_000, "a checkpoint is larger"
    load_checkpoint(path, backbone=tiny())
    assert sorted(os.listdir(small)) == ["filled", "saved"]
    assert not [name for name in os.listdir(path) if name.startswith(".")]


def test_a_limit_on_file_size_leaves_no_partial_checkpoint(tmp_path, short):
    with pytest.raises(OSError, match="cannot be written: File too large"):
        save_checkpoint(make(train_backbone=True), tiny_tokenizer(), tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_training_on_a_full_disk_leaves_whole_checkpoints(small):
    arguments = GradMemTrainingArguments(
        str(small / "run"), max_steps=20, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = GradMemTrainer(make(**CONFIG), arguments, train_dataset=rows(4, 6), processing_class=tiny_tokenizer())
    with pytest.raises(OSError, match="cannot be written") as error:
        trainer.train()
    whole = sorted(os.listdir(small / "run"))
    assert whole == [f"checkpoint-{i + 1}" for i in range(len(whole))] != []
    assert error.value.filename == str(small / "run" / f"checkpoint-{len(whole) + 1}")
    for name in whole:
        load_checkpoint(small / "run" / name, backbone=tiny())
    assert trainer.has_checkpoint()


def test_the_write_command_continues_once_there_is_room(small, folder):
    lines = [json.dumps({"text": tiny_text(30, seed=seed)}) for seed in range(60)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    options = ("--checkpoint", folder / "checkpoint", "--segment-tokens", 20, "--max-tokens", 60, "--device", "cpu")
    command = ("write", folder / "lines.jsonl", "--store", small / "memory", *options)
    result = invoke(*command)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "No space left on device" in result.stderr
    assert "Make room there" in result.stderr
    store = MemoryStore(small / "memory")
    stored = len(store)
    assert 0 < stored < 120
    assert not store.verify().damaged
    mount("-o", "remount,size=8m", small)
    again = invoke(*command, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["segments"] == len(store) == 120
    assert json.loads(again.stdout)["written"] <= 120 - stored
    assert store.verify().ok
    mount("-o", "remount,ro", small)
    assert "Read-only file system" in invoke(*command).stderr
    asked = ("ask", "w1", "--store", small / "memory", "--checkpoint", folder / "checkpoint", "--device", "cpu")
    assert invoke(*asked, "--max-new-tokens", 2).exit_code == 0


def test_read_only_states_and_checkpoints_can_be_loaded(small):
    state(10).save(small / "states")
    save_checkpoint(make(**CONFIG), tiny_tokenizer(), small / "saved")
    mount("-o", "remount,ro", small)
    assert MemoryState.load(small / "states") == state(10)
    load_checkpoint(small / "saved", backbone=tiny())
    refused(small / "states", errno.EROFS, lambda: state(11).save(small / "states"))
    refused(small / "saved", errno.EROFS, lambda: save_checkpoint(make(**CONFIG), tiny_tokenizer(), small / "saved"))


def test_a_server_answers_from_a_store_that_it_cannot_write_to(small, folder, monkeypatch):
    app = serve.create_app(tiny_pipeline(trained_length=12), small / "store")
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:

        def ask():
            body = {"model": "gradmem", "prompt": "w1 w2", "memory": [kept["id"]], "max_tokens": 3}
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

        kept = client.post("/v1/memories", json={"text": "w1 w2 w3"}).json()
        answer, place = ask(), f"/v1/memories/{kept['id']}"
        for spoil, status, code in (
            (lambda: fill_up(small), 507, "store_full"),
            (lambda: mount("-o", "remount,ro", small), 503, "store_read_only"),
        ):
            spoil()
            assert [one["id"] for one in client.get("/v1/memories").json()["data"]] == [kept["id"]]
            assert client.get(place).json() == kept
            assert client.post("/v1/memories", json={"text": "w1 w2 w3"}).json() == kept
            assert ask() == answer
            refused = client.post("/v1/memories", json={"text": "w4 w5"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
            *_, error, done = (
                client.post("/v1/memories", json={"text": "w4 w5", "stream": True}).text.strip().split("\n\n")
            )
            assert (json.loads(error.removeprefix("data: "))["error"]["code"], done) == (code, "data: [DONE]")
        assert client.delete(place).json()["error"]["code"] == "store_read_only"
        monkeypatch.setattr(serve, "run", lambda app, **options: None)
        result = invoke(
            "serve", folder / "checkpoint", "--store", small / "store", "--segment-tokens", 8, "--device", "cpu"
        )
        assert result.exit_code == 0, result.output
        assert "Read-only file system. Memories can be asked, but not added or deleted." in result.stderr
        mount("-o", "remount,rw", small)
        (small / "filler").unlink()
        assert client.post("/v1/memories", json={"text": "w4 w5"}).status_code == 200
    assert MemoryStore(small / "store").verify().ok


def test_a_server_with_keys_works_on_a_read_only_disk(small, folder, monkeypatch):
    """There are only the tenants' stores, and one tenant has none yet."""
    started = []
    monkeypatch.setattr(serve, "run", lambda app, **options: started.append(app))
    (folder / "keys").write_text(f"anna {'a' * 16}\nbert {'b' * 16}\n")
    options = ("--keys", folder / "keys", "--segment-tokens", 8, "--device", "cpu")
    command = ("serve", folder / "checkpoint", "--store", small / "store", *options)
    anna, bert = ({"Authorization": f"Bearer {letter * 16}"} for letter in "ab")
    mount("-o", "remount,ro", small)
    assert invoke(*command).exit_code == 2, "there is nothing that could be served"
    mount("-o", "remount,rw", small)
    assert invoke(*command).exit_code == 0
    with TestClient(started.pop()) as client:
        kept = client.post("/v1/memories", json={"text": "w1 w2 w3"}, headers=anna).json()
    mount("-o", "remount,ro", small)
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    with TestClient(started.pop()) as client:
        assert [one["id"] for one in client.get("/v1/memories", headers=anna).json()["data"]] == [kept["id"]]
        assert client.get("/v1/memories", headers=bert).json()["data"] == []
        refused = client.post("/v1/memories", json={"text": "w4 w5"}, headers=bert)
        assert refused.json()["error"]["code"] == "store_read_only"
