"""Endless jobs, which are killed."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import torch


def save_states(ready, path):
    from gradmem_adapter import MemoryState

    states = [
        MemoryState(torch.full((1, 400, 400), float(i)), torch.tensor([i + 1]), torch.zeros(1, 1), "f")
        for i in range(2)
    ]
    states[0].save(path)
    ready()
    for i in itertools.count():
        states[i % 2].save(path)


def filled(model, value):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gradmem" in name or model.peft_config["default"].train_backbone:
                parameter.fill_(value)


def save_checkpoints(ready, path, config):
    from adapters import make
    from tiny import tiny_tokenizer

    from gradmem_adapter import save_checkpoint

    model, tokenizer = make(**config), tiny_tokenizer()
    ready()
    for i in itertools.count():
        filled(model, i % 7)
        save_checkpoint(model, tokenizer, path)


def write(ready, folder):
    from gradmem_adapter.cli import app

    ready()
    for i in itertools.count():
        text, output = folder / f"{i % 2}.txt", folder / "states"
        arguments = [
            "write",
            text,
            "--checkpoint",
            folder / "checkpoint",
            "--output",
            output,
            "--force",
            "--device",
            "cpu",
        ]
        app([str(argument) for argument in arguments], standalone_mode=False)


def write_lines(folder, puts):
    """`gradmem write` of JSON lines into a store, killed while it stores batch number `puts`."""
    from gradmem_adapter.cli import app
    from gradmem_adapter.store import MemoryStore

    put, count = MemoryStore.put, itertools.count(1)

    def counted(*arguments, **how):
        if next(count) == puts:
            os.kill(os.getpid(), signal.SIGKILL)
        put(*arguments, **how)

    MemoryStore.put = counted
    arguments = ["write", folder / "lines.jsonl", "--store", folder / "memory", "--checkpoint", folder / "checkpoint"]
    arguments += ["--segment-tokens", 20, "--max-tokens", 60, "--device", "cpu"]
    app([str(argument) for argument in arguments], standalone_mode=False)


def train(ready, folder: Path):
    """Ready when it saves its first checkpoint."""
    from gradmem_adapter.cli import app
    from gradmem_adapter.training import GradMemTrainer

    save = GradMemTrainer._save_checkpoint
    GradMemTrainer._save_checkpoint = lambda *arguments: (ready(), save(*arguments))

    arguments = ["train", folder / "rows.jsonl", "--output", folder / "run", "--backbone", folder / "backbone"]
    for setting in ("max_steps=60", "save_steps=3", "save_total_limit=2", "disable_tqdm=true"):
        arguments += ["--set", f"training.{setting}"]
    arguments += ["--set", "memory.num_memory_tokens=2", "--set", "memory.lora_config.r=2", "--device", "cpu"]
    app([str(argument) for argument in arguments], standalone_mode=False)


def stored_state(number):
    from gradmem_adapter import MemoryState

    return MemoryState(torch.full((1, 4, 64), float(number)), torch.tensor([number + 1]), torch.zeros(1, 1), "f")


def key(number):
    return f"{number:032x}"


def put_state(path, number, source="source"):
    from gradmem_adapter.store import Entry, MemoryStore

    MemoryStore(path).put(stored_state(number), [Entry(key(number), source=source, text=f"text {number}")])


def put_and_forget(path):
    from gradmem_adapter.store import MemoryStore

    put_state(path, 2, "other")
    put_state(path, 2)
    put_state(path, 3)
    MemoryStore(path).forget("source")


def fill_store(ready, path, count=None):
    from gradmem_adapter.store import MemoryStore

    store = MemoryStore(path)
    numbers = itertools.count() if count is None else range(count)
    ready()
    for i in numbers:
        if key(i) not in store:
            put_state(path, i)
