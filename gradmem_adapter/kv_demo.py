"""The demonstration on key-value retrieval: pairs in, context gone, keys asked."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .checkpoint import load_checkpoint
from .pipeline import GradMemPipeline
from .tasks.kv_retrieval import EDGE, KVRetrieval, kv_exact_match

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "kv-retrieval"
"""Where the trained weights lie in a source tree; the wheel does not carry them."""
SHOWN = 8


@dataclass(frozen=True)
class KVDemoResult:
    """The figures of the last line."""

    pairs: int
    write_steps: int
    exact_match: float
    context_tokens: int
    memory_tokens: int
    write_seconds: float


def run_kv_demo(
    checkpoint: Path = CHECKPOINT, *, pairs: int = 16, steps: int = 5, seed: int = 0, console: Console | None = None
) -> KVDemoResult:
    """Write random pairs into memory, drop them, and ask every key.

    Args:
        checkpoint: weights trained on key-value retrieval.
        pairs: how many; trained on 4 to 96.
        steps: write steps.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a number of pairs that the task does not have or that does not fit the model.
    """
    console = console or Console()
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    row = next(KVRetrieval(pairs).rows(1, pairs, seed))
    console.print(Panel(Text(row["context"]), title=f"The context: {pairs} pairs !key:value!"))
    start = time.perf_counter()
    state = pipeline.write(row["context"], steps=steps)
    seconds = time.perf_counter() - start
    losses = state.write_losses[0]
    console.print(
        f"Written into {state.vectors.shape[1]} vectors in {steps} steps, {seconds:.2f} s; write loss "
        f"{losses[0].item():.2f} -> {losses[-1].item():.2f}. The context is gone."
    )
    answers = pipeline.generate(row["queries"], memory=state, max_new_tokens=8, do_sample=False)
    hits = [kv_exact_match(answer, target) for answer, target in zip(answers, row["targets"], strict=True)]
    table = Table("asked", "answered", "in the context", title=f"The first {min(SHOWN, pairs)} of {pairs} keys")
    for query, answer, target in list(zip(row["queries"], answers, row["targets"], strict=True))[:SHOWN]:
        table.add_row(*(Text(text) for text in (query, answer.split(EDGE)[0], target.split(EDGE)[0])))
    console.print(table)
    result = KVDemoResult(
        pairs=pairs,
        write_steps=steps,
        exact_match=sum(hits) / len(hits),
        context_tokens=int(state.context_tokens[0]),
        memory_tokens=state.vectors.shape[1],
        write_seconds=round(seconds, 2),
    )
    console.print(f"demo: {json.dumps(asdict(result))}", markup=False, soft_wrap=True)
    return result
