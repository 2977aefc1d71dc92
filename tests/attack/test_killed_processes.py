"""Two processes that write documents into one store, as torchrun starts them, are killed repeatedly."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from adapters import make
from tiny import tiny_text, tiny_tokenizer

from gradmem_adapter import save_checkpoint
from gradmem_adapter.store import MemoryStore

DOCUMENTS = 1000


@pytest.mark.slow
def test_a_thousand_documents_are_each_written_once(tmp_path):
    texts = [tiny_text(15 + i % 12, seed=i) for i in range(DOCUMENTS)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_checkpoint(make(train_backbone=True), tiny_tokenizer(), tmp_path / "checkpoint")
    store, dice, kills = MemoryStore(tmp_path / "memory"), random.Random(0), 0
    while True:
        before = len(store)
        launched = launch(tmp_path)
        while len(store) == before and launched.poll() is None:
            time.sleep(0.02)
        try:
            launched.wait(dice.uniform(0, 3))
        except subprocess.TimeoutExpired:
            kill_all(launched)
            kills += 1
            assert not store.verify().damaged
            assert len(store) > before, "no run was in vain"
        else:
            break
    assert launched.returncode == 0
    assert kills > 2
    found = {entry.source: entry.text for entry in store.entries()}
    assert found == {f"lines.jsonl:{i}": text for i, text in enumerate(texts, 1)}
    assert len(store) == DOCUMENTS
    store.gc()
    assert store.verify().ok
    assert sorted(os.listdir(store.path)) == ["index.sqlite", "states"]
    assert sum(file.is_file() for file in (store.path / "states").rglob("*")) == DOCUMENTS


def launch(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "gradmem_adapter.cli", "write", "lines.jsonl", "--store", "memory", "--checkpoint", "checkpoint"]
    command += ["--device", "cpu", "--segment-tokens", "40", "--max-tokens", "60"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_all(launched):
    family = psutil.Process(launched.pid)
    for process in [family, *family.children(recursive=True)]:
        process.kill()
    launched.wait()
