"""Processes are killed while they save: the file is whole, and what they left goes with the next save."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from gradmem_adapter import MemoryState

SAVE = """
import itertools, sys, torch
from gradmem_adapter.state import MemoryState
states = [
    MemoryState(torch.full((1, 400, 400), float(i)), torch.tensor([i + 1]), torch.zeros(1, 1), "f") for i in range(2)
]
print("ready", flush=True)
for i in itertools.count():
    states[i % 2].save(sys.argv[1])
"""


def attack(path, kills):
    """Kill so many processes that do nothing but save."""
    for seed in range(kills):
        process = subprocess.Popen([sys.executable, "-c", SAVE, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0.02, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = MemoryState.load(path)
        assert torch.equal(state.vectors, torch.full_like(state.vectors, float(state.context_tokens) - 1))
        assert len(os.listdir(path.parent)) <= 2, "more than the last process left is there"
    state.save(path)
    assert os.listdir(path.parent) == [path.name]


def test_killed_while_saving(tmp_path):
    attack(tmp_path / "state.safetensors", 1)


@pytest.mark.slow
def test_killed_often_while_saving(tmp_path):
    attack(tmp_path / "state.safetensors", 200)
