"""Key-value retrieval: write pairs into memory, drop the context, ask for each key."""

from __future__ import annotations

import itertools
import random
import string
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.utils.wording import counted

ALPHABET = string.ascii_letters + string.digits
SHOWN = 8


def draw_pairs(count: int, seed: int) -> dict[str, str]:
    """Random keys and values of two letters or digits each; all keys are different.

    Raises:
        ValueError: there are fewer than `count` keys.
    """
    draw = random.Random(seed)
    keys = ["".join(key) for key in itertools.product(ALPHABET, repeat=2)]
    if not 1 <= count <= len(keys):
        raise ValueError(f"pairs must be from 1 to {len(keys)}, the number of different keys, got {count}.")
    return {key: "".join(draw.choices(ALPHABET, k=2)) for key in draw.sample(keys, count)}


def run_key_value_demo(
    checkpoint: str | Path,
    *,
    backbone: str | None = None,
    pairs: int = 16,
    steps: int = 5,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write random pairs into memory, drop them, and ask for every key; returns the figures.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: there are not enough keys for so many pairs, or the context does not fit the model.
    """
    console = console or Console()
    values = draw_pairs(pairs, seed)
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint, backbone=backbone))
    context = "".join(f"!{key}:{value}!" for key, value in values.items()) + "|"
    console.print(Panel(Text(context), title=f"The context: {counted(pairs, 'pair')} !key:value!"))
    start = time.perf_counter()
    state = pipeline.write(context, steps=steps)
    seconds = time.perf_counter() - start
    losses = state.write_losses[0]
    console.print(
        f"Written into {counted(state.num_memory_tokens, 'vector')} in {counted(steps, 'step')}, {seconds:.2f} s; "
        f"write loss {losses[0].item():.2f} -> {losses[-1].item():.2f}. The context is gone."
    )
    queries = [f"?!{key}:" for key in values]
    answers = pipeline.generate(queries, memory=state, max_new_tokens=8, do_sample=False)
    answers = [answer.split("!")[0] for answer in answers]  # as in the context, ! ends a value
    table = Table(
        "asked", "answered", "in the context", title=f"The first {min(SHOWN, pairs)} of {counted(pairs, 'key')}"
    )
    for row in itertools.islice(zip(queries, answers, values.values(), strict=True), SHOWN):
        table.add_row(*map(Text, row))
    console.print(table)
    return {
        "pairs": pairs,
        "write_steps": steps,
        "exact_match": sum(map(str.__eq__, answers, values.values())) / pairs,
        "context_tokens": int(state.context_tokens[0]),
        "memory_tokens": state.num_memory_tokens,
        "write_seconds": round(seconds, 2),
    }
