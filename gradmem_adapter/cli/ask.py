"""`gradmem ask`: questions in, answers from memory out: of a text, of a state that was kept, or of a memory store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.cli.inputs import Inputs
from gradmem_adapter.cli.options import (
    CHECKPOINT,
    DEVICE,
    JSON,
    QA_CHECKPOINT,
    chosen_device,
    existing_store,
    in_words,
    print_json,
)
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.store import MemoryStore
from gradmem_adapter.utils.files import check_writable


def ask(
    questions: Annotated[list[str], typer.Argument(help="Questions, each answered by itself.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file to ask about, or - for standard input; several are read side by side."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(file_okay=False, help="A memory store to ask: what `gradmem write --store` made.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="store: how many states an answer may come from.")] = 4,
    checkpoint: Annotated[Path, CHECKPOINT] = QA_CHECKPOINT,
    state: Annotated[
        Path | None, typer.Option(help="Keep the memory in this file, or ask the one that was kept, without the text.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Write steps; default: the adapter's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Answer questions from memory alone: of texts that are written now, of a state that was kept, or of a store."""
    _check_questions(questions)
    there = None if store is None else existing_store(store)
    texts = [document.text.strip() for document in Inputs(text or ()).read_all()]
    _check_memories(texts, state, there)
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=chosen_device(device)))
    start = time.perf_counter()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if there is not None:
        answers = [_from_store(there, pipeline, question, k, options) for question in questions]
        _print({"answers": answers}, as_json)
        return
    memory = _memory(pipeline, texts, state, steps)
    figures = {
        "context_tokens": int(memory.context_tokens[0]),
        "memory_tokens": memory.num_memory_tokens,
        "state_bytes": len(memory.to_bytes()),
        "done": "written" if texts else "read",
        "seconds": time.perf_counter() - start,
    }
    found = zip(questions, pipeline.generate(questions, memory=memory, **options), strict=True)
    _print(figures | {"answers": [{"question": one, "answer": answer.strip()} for one, answer in found]}, as_json)
    if texts and state is not None:
        memory.save(state)  # after the answers, which a full disk must not take away


def _from_store(
    store: MemoryStore, pipeline: GradMemPipeline, question: str, k: int, options: dict[str, Any]
) -> dict[str, Any]:
    """An answer from the states that a question needs; None where the store has none for it.

    An adapter that knows when a state does not hold an answer reads each by itself; others read them side by side.
    """
    chosen = store.choose(pipeline, question, k)
    answer = None
    if chosen:
        states = store.get([choice.entry.key for choice in chosen], pipeline.model.fingerprint())
        if pipeline.model.active_peft_config.refusal is None:
            (answer,) = pipeline.generate([question], memory=MemoryState.concat(list(states)), **options)
        else:
            found = pipeline.surest_answer(question, memory=states, **options)
            answer, chosen = found.text, [chosen[found.state]]
    named = ("key", "source", "start", "end")
    sources = [{name: getattr(one.entry, name) for name in named} | {"score": one.score} for one in chosen]
    return {"question": question, "answer": answer and answer.strip(), "sources": sources}


def _print(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
        return
    console = Console()
    if "done" in figures:
        console.print(
            f"{figures['context_tokens']} tokens are in {figures['memory_tokens']} vectors, "
            f"{figures['state_bytes']:,} bytes ({figures['done']} in {figures['seconds']:.2f} s)."
        )
    names = ("asked", "answered from memory", "of")
    table = Table(*(Column(name, overflow="fold") for name in names[: len(figures["answers"][0])]))
    for row in figures["answers"]:
        cells = [row["question"], "(no text in the store has a word of it)" if row["answer"] is None else row["answer"]]
        if "sources" in row:
            cells.append(in_words(row["sources"]))
        table.add_row(*map(Text, cells))
    console.print(table)


def _check_questions(questions: Sequence[str]) -> None:
    for question in questions:
        if not question.strip():
            raise ValueError("A question is empty. Leave it out.")
        if os.path.isfile(question):
            raise ValueError(f"The question {question!r} is the name of a file. Ask about it with --text {question}.")


def _check_memories(texts: Sequence[str], state: Path | None, store: MemoryStore | None) -> None:
    """Raise unless there is one thing to ask, texts to write, a state to read or a store, before the work begins."""
    kept = state is not None and state.exists()
    if store is not None:
        if texts or state is not None:
            raise ValueError("A store is asked by itself: leave --text and --state out, or --store.")
    elif texts and kept:
        raise ValueError(f"{state} exists. Leave the texts out to ask what it holds, or name another file.")
    elif not texts and not kept:
        raise ValueError(
            "There is nothing to ask about: pass --text, --state with a file that was written before, or --store."
        )
    elif state is not None and texts:
        check_writable(state)


def _memory(pipeline: GradMemPipeline, texts: Sequence[str], state: Path | None, steps: int | None) -> MemoryState:
    """The states of all texts side by side, written or read from a file."""
    if not texts and state is not None:
        return MemoryState.concat(list(MemoryState.load(state)))
    return MemoryState.concat(list(pipeline.write_many(texts, steps=steps)))
