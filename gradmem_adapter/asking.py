"""`gradmem ask`: a text and questions in, answers from memory out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmem_adapter.utils.files import check_writable

from .checkpoint import load_checkpoint
from .pipeline import GradMemPipeline
from .state import MemoryState

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "smollm2-135m-qa"
"""Where the adapter trained on questions lies in a source tree; the wheel does not carry it."""


@dataclass(frozen=True)
class Asked:
    """What was asked, answered, and kept."""

    answers: list[str]
    context_tokens: int
    memory_tokens: int
    state_bytes: int
    write_seconds: float


def ask(
    checkpoint: Path,
    texts: Sequence[str],
    questions: Sequence[str],
    *,
    state: Path | None = None,
    steps: int | None = None,
    max_new_tokens: int = 48,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Asked:
    """Write texts once, side by side, and answer questions from their memory alone.

    Args:
        checkpoint: what `load_checkpoint` opens.
        texts: what is asked about; each is written by itself. None are needed where `state` exists.
        state: a file for the memory: read if it exists (all states in it, side by side), otherwise written.
        steps: write steps (default: the adapter's).

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: no question, or neither a text nor a state; both a text and a state that exists.
    """
    if not questions:
        raise ValueError("There is no question to answer.")
    if texts and state is not None and state.exists():
        raise ValueError(
            f"{state} exists and holds what was written before. Leave the texts out, or name another file."
        )
    if not texts and (state is None or not state.exists()):
        raise ValueError("There is nothing to ask about: pass a text, or --state with a file that was written before.")
    if texts and state is not None:
        check_writable(state)
    console = console or Console()
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=device))
    start = time.perf_counter()
    if texts:
        memory = MemoryState.concat(list(pipeline.write_many(texts, steps=steps)))
        if state is not None:
            memory.save(state)
    else:
        assert state is not None  # for the type checker: one of the two was given
        memory = MemoryState.concat(list(MemoryState.load(state))).to(device)
    seconds = time.perf_counter() - start
    answers = pipeline.generate(list(questions), memory=memory, max_new_tokens=max_new_tokens, do_sample=False)
    result = Asked(
        answers=[answer.strip() for answer in answers],
        context_tokens=int(memory.context_tokens[0]),
        memory_tokens=memory.num_memory_tokens,
        state_bytes=len(memory.to_bytes()),
        write_seconds=round(seconds, 2),
    )
    console.print(
        f"{result.context_tokens} tokens are in {result.memory_tokens} vectors, {result.state_bytes:,} bytes "
        f"({'written' if texts else 'read'} in {seconds:.2f} s)."
    )
    table = Table("asked", "answered from memory")
    for question, answer in zip(questions, result.answers, strict=True):
        table.add_row(Text(question), Text(answer))
    console.print(table)
    return result
