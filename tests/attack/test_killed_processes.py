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

DOCUMENTS, KILLS = 1000, 5
MOST = 100
"""New states after which a run is killed at the latest, so that KILLS runs are far from storing all documents."""


@pytest.mark.slow
def test_a_thousand_documents_are_each_written_once(tmp_path):
    texts = [tiny_text(15 + i % 12, seed=i) for i in range(DOCUMENTS)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_checkpoint(make(train_backbone=True), tiny_tokenizer(), tmp_path / "checkpoint")
    store, dice = MemoryStore(tmp_path / "memory"), random.Random(0)
    for kill in range(KILLS):
        goal = len(store) + dice.randint(1, MOST)
        launched, output = launch(tmp_path, f"run-{kill}.txt")
        while len(store) < goal:
            assert launched.poll() is None, f"the run ended before it was killed:\n{output.read_text()}"
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))  # at any moment of the next batches
        kill_all(launched)
        assert not store.verify().damaged
    assert len(store) < DOCUMENTS, "the last run has nothing to write"
    launched, output = launch(tmp_path, "last-run.txt")
    assert launched.wait() == 0, output.read_text()
    found = {entry.source: entry.text for entry in store.entries()}
    assert found == {f"lines.jsonl:{i}": text for i, text in enumerate(texts, 1)}
    assert len(store) == DOCUMENTS
    store.gc()
    assert store.verify().ok
    assert sorted(os.listdir(store.path)) == ["index.sqlite", "states"]
    assert sum(file.is_file() for file in (store.path / "states").rglob("*")) == DOCUMENTS


def launch(folder, name):
    """Two processes that write the documents, and the file in `folder` that gets what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "gradmem_adapter.cli", "write", "lines.jsonl", "--store", "memory", "--checkpoint", "checkpoint"]
    command += ["--device", "cpu", "--segment-tokens", "40", "--max-tokens", "60"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / name).open("w") as output:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return run, folder / name


def kill_all(launched):
    family = psutil.Process(launched.pid)
    for process in [family, *family.children(recursive=True)]:
        process.kill()
    launched.wait()
