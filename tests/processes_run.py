"""What each of two processes runs for test_processes.py and test_cuda.py: `processes_run.py FOLDER DEVICE`."""

import dataclasses
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import two_processes
from test_kv_training import recipe

from gradmem_adapter.tasks.kv_recipe import KVRecipe
from gradmem_adapter.tasks.kv_training import train_kv
from gradmem_adapter.tasks.saved import claim_run
from gradmem_adapter.training import TrainingDiverged, graphed_run
from gradmem_adapter.training.processes import joined, rank

MEMORY = {"num_memory_tokens": 4, "learn_write_lr": "scalar", "meta_gradient": "exact"}


def plan(**fields) -> KVRecipe:
    """Clipped, so that it shows whether gradients are averaged before."""
    return recipe(steps=8, memory=MEMORY, max_grad_norm=0.1, compile=False, **fields)


def start(folder, device):
    """Run this file in two processes: the results of each, and what they printed."""
    (folder / "recipe.yaml").write_text(json.dumps(dataclasses.asdict(plan())), encoding="utf-8")
    claim_run(plan(seed=1), folder / "claimed")
    (folder / "claimed" / "last").mkdir()
    return two_processes.start("processes_run.py", folder, device, folder=folder, cuda=device == "cuda")


def train(plan, output, device, **options):
    """What a run was like: its weights, its logs, the random state at each of them, and how it ended."""
    model = plan.build()
    if rank():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # the weights of process 0 are those that count
    logs, random = [], []
    more = options.pop("callback", lambda now, model: None)

    def callback(now):
        logs.append((now.step, now.means))
        random.append(torch.get_rng_state())
        more(now, model)

    try:
        end = train_kv(model, plan, output, device=device, callback=callback, **{"log_every": 2} | options)
    except (KeyboardInterrupt, TrainingDiverged) as error:
        end = f"{type(error).__name__}: {error}"
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "logs": logs, "random": random, "end": end}


def interrupt(now, model):
    if now.step == 4 and rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)


def poison(now, model):
    if now.step == 4 and rank() == 1:
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)


def all_runs(folder, device):
    long = plan(stages=[{"steps": 100_000, "mix": [{"max_pairs": 2, "contexts": 2, "queries": 2}]}])
    results = {
        "whole": train(plan(), folder / "whole", device),
        "parts": train(plan(), folder / "parts", device, stop=lambda now: rank() == 0 and now.step == 4),
        "resumed": train(plan(), folder / "parts", device),
        "interrupted": train(plan(), folder / "interrupted", device, callback=interrupt, log_every=1),
        "diverged": train(plan(), folder / "diverged", device, callback=poison, save_seconds=0),
    }
    if rank():  # a clock that runs differently
        graphed_run.time = SimpleNamespace(perf_counter=lambda: 1000 * time.perf_counter())
    results["within"] = train(dataclasses.replace(long, minutes=0.5 / 60), folder / "within", device)
    results["max_seconds"] = train(long, folder / "max_seconds", device, max_seconds=0.5)
    return results


def command(recipe, output, device):
    """`python -m gradmem_adapter.cli train`, and the status that it exits with."""
    sys.argv[1:] = ["train", str(recipe), "--output", str(output), "--device", device]
    try:
        runpy.run_module("gradmem_adapter.cli", run_name="__main__")
    except SystemExit as end:
        return end.code


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, name = Path(sys.argv[1]), sys.argv[2]
    with joined(torch.device(name)) as device:
        results = all_runs(place, device)
        results["command"] = command(place / "recipe.yaml", place / "command", name)
        results["refused"] = command(place / "recipe.yaml", place / "claimed", name)
        torch.save(results, place / f"results-{rank()}.pt")
