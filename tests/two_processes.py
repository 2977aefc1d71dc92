"""Starts a script in two processes that train together, as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def start(script, *arguments, folder, cuda=False):
    """Runs `tests/SCRIPT ARGUMENTS`; returns what each process left in `folder` as results-RANK.pt, and the output."""
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return [torch.load(folder / f"results-{rank}.pt", map_location="cpu") for rank in range(2)], done
