"""`gradmem ask`: a text and questions in, answers from memory out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.cli.inputs import Inputs
from gradmem_adapter.cli.options import CHECKPOINT, DEVICE, JSON, QA_CHECKPOINT, chosen_device, print_json
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.files import check_writable


def ask(
    questions: Annotated[list[str], typer.Argument(help="Questions, each answered by itself.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file to ask about, or - for standard input; several are read side by side."),
    ] = None,
    checkpoint: Annotated[Path, CHECKPOINT] = QA_CHECKPOINT,
    state: Annotated[
        Path | None, typer.Option(help="Keep the memory in this file, or ask the one that was kept, without the text.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Write steps; default: the adapter's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write texts into memory, drop them, and answer questions from the memory alone."""
    _check_questions(questions)
    texts = [document.text.strip() for document in Inputs(text or ()).read_all()]
    _check_files(texts, state)
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=chosen_device(device)))
    start = time.perf_counter()
    memory = _memory(pipeline, texts, state, steps)
    figures: dict[str, Any] = {
        "context_tokens": int(memory.context_tokens[0]),
        "memory_tokens": memory.num_memory_tokens,
        "state_bytes": len(memory.to_bytes()),
        "written": bool(texts),
        "seconds": time.perf_counter() - start,
    }
    answers = pipeline.generate(questions, memory=memory, max_new_tokens=max_new_tokens, do_sample=False)
    figures["answers"] = [
        {"question": question, "answer": answer.strip()} for question, answer in zip(questions, answers, strict=True)
    ]
    if as_json:
        print_json(figures)
    else:
        _print(figures)
    if texts and state is not None:
        memory.save(state)  # after the answers, which a full disk must not take away


def _print(figures: dict[str, Any]) -> None:
    console = Console()
    done = "written" if figures["written"] else "read"
    console.print(
        f"{figures['context_tokens']} tokens are in {figures['memory_tokens']} vectors, "
        f"{figures['state_bytes']:,} bytes ({done} in {figures['seconds']:.2f} s)."
    )
    table = Table("asked", "answered from memory")
    for row in figures["answers"]:
        table.add_row(Text(row["question"]), Text(row["answer"]))
    console.print(table)


def _check_questions(questions: Sequence[str]) -> None:
    for question in questions:
        if not question.strip():
            raise ValueError("A question is empty. Leave it out.")
        if os.path.isfile(question):
            raise ValueError(f"The question {question!r} is the name of a file. Ask about it with --text {question}.")


def _check_files(texts: Sequence[str], state: Path | None) -> None:
    """Raise unless there is either a text to write or a state to read, before the work begins."""
    kept = state is not None and state.exists()
    if texts and kept:
        raise ValueError(f"{state} exists. Leave the texts out to ask what it holds, or name another file.")
    if not texts and not kept:
        raise ValueError("There is nothing to ask about: pass a text, or --state with a file that was written before.")
    if texts and state is not None:
        check_writable(state)


def _memory(pipeline: GradMemPipeline, texts: Sequence[str], state: Path | None, steps: int | None) -> MemoryState:
    """The states of all texts side by side, written or read from a file."""
    if not texts and state is not None:
        return MemoryState.concat(list(MemoryState.load(state)))
    return MemoryState.concat(list(pipeline.write_many(texts, steps=steps)))
