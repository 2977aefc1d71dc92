"""`gradmem ask`: answers questions from memory: from texts, from saved states, or from a memory store."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gradmem_adapter.cli.inputs import Document, Inputs
from gradmem_adapter.cli.options import (
    BACKBONE,
    CHECKPOINT,
    DEVICE,
    JSON,
    check_source,
    check_used,
    existing_store,
    in_words,
    open_pipeline,
    print_json,
    visible,
)
from gradmem_adapter.utils.files import check_writable
from gradmem_adapter.utils.shipped import QA
from gradmem_adapter.utils.wording import counted

if TYPE_CHECKING:
    from gradmem_adapter import GradMemPipeline, MemoryState, MemoryStore

REPEATED = "overlaps included"
TEXT = """Text to ask about: a file, a directory, a quoted pattern, or - for standard input. May be repeated. Long
texts are written in segments."""


def ask(
    context: typer.Context,
    questions: Annotated[list[str], typer.Argument(help="Questions, each answered separately.")],
    text: Annotated[list[str] | None, typer.Option(help=TEXT)] = None,
    store: Annotated[
        Path | None, typer.Option(file_okay=False, help="A memory store to ask, made by `gradmem write --store`.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="store: ask only this source, as listed by `gradmem store list`.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="store: the most states an answer may come from.")] = 4,
    checkpoint: Annotated[str, CHECKPOINT] = QA,
    backbone: Annotated[str | None, BACKBONE] = None,
    state: Annotated[
        Path | None, typer.Option(help="Save the memory to this file; or, without --text, ask the memory saved there.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Write steps; default: the adapter's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens in an answer.")] = 48,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Answer questions from memory alone: about texts written now, a saved state, or a memory store."""
    check_used(context, "--store", store is not None, "k", "source")
    check_used(context, "--text", bool(text), "steps")
    _check_questions(questions)
    there = None if store is None else existing_store(store)
    documents = Inputs(text or ()).read_all()
    _check_memories(text, documents, state, there)
    if there is not None and source is not None:
        check_source(there, source)
    pipeline = open_pipeline(checkpoint, backbone, device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    figures: dict[str, Any] = {}
    if there is None:
        start = time.perf_counter()
        states, places = _write(pipeline, documents, steps) if documents else _kept(pipeline, cast(Path, state))
        figures = {
            "context_tokens": int(states.context_tokens.sum()),
            "states": len(states),
            "memory_tokens": len(states) * states.num_memory_tokens,
            "state_bytes": len(states.to_bytes()),
            "done": "written" if documents else "read",
            "seconds": time.perf_counter() - start,
        }
        if not as_json:
            repeated = f" ({REPEATED})" if _overlap(places) else ""
            split = f" of {counted(len(states), 'state')}" if len(states) > 1 else ""
            typer.echo(
                f"{counted(figures['context_tokens'], 'token')}{repeated} in "
                f"{counted(figures['memory_tokens'], 'vector')}{split}, {figures['state_bytes']:,} bytes "
                f"({figures['done']} in {figures['seconds']:.2f} s)."
            )
    answers = []
    for question in questions:
        found = (states, places) if there is None else _chosen(there, pipeline, question, k, source)
        answers.append(_answer(pipeline, question, *found, options, as_json))
    if as_json:
        print_json(figures | {"answers": answers})
    if documents and state is not None:
        states.save(state)  # last, so that a full disk does not cost the answers


def _answer(
    pipeline: GradMemPipeline,
    question: str,
    states: MemoryState | None,
    places: Sequence[dict[str, Any]],
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """Answer a question and say how far memory supports the answer and where it comes from. Prints unless quiet."""
    if not quiet:
        typer.secho(visible(question), bold=True)
    if states is None:
        if not quiet:
            typer.echo("  (no text in the store shares a word with it)")
        return {"question": question, "answer": None, "support": None, "sources": []}
    pieces, support, read = _pieces(pipeline, question, states, places, options)
    sources = [places[i] for i in read]
    answer = ""
    for piece in pieces:
        new = piece if answer else piece.lstrip()
        if not quiet and new:
            typer.echo(visible(new if answer else f"  {new}"), nl=False)
        answer += new
    if not quiet:
        answered = answer.strip() != pipeline.model.active_peft_config.refusal  # a refusal has no source
        whence = f", {in_words(sources)}" if answered and (len(places) > 1 or "key" in places[0]) else ""
        partly = dict.fromkeys(visible(one["source"]) for one in sources if not one.get("whole", True))
        whence += "".join(f"\n{source} is not stored to its end: write it again to continue" for source in partly)
        typer.secho(f"  (support {support:.2f}{whence})".replace("\n", "; "), dim=True)
    return {"question": question, "answer": answer.strip(), "support": support, "sources": sources}


def _pieces(
    pipeline: GradMemPipeline,
    question: str,
    states: MemoryState,
    places: Sequence[dict[str, Any]],
    options: dict[str, Any],
) -> tuple[Iterable[str], float, list[int]]:
    """An answer's pieces, how far memory supports it, and the states that it comes from.

    With an adapter that was not trained to refuse, the answer is scored only when it is complete.
    """
    searched = [place["score"] for place in places if "score" in place] or None
    memory, read, support = pipeline.select(question, memory=states, search_scores=searched, support=True)
    if support is not None:
        return pipeline.stream(question, memory=memory, **options), support, read
    (found,) = pipeline.generate([question], memory=memory, return_scores=True, **options)
    return [found.text], found.score, read


def _write(
    pipeline: GradMemPipeline, documents: Sequence[Document], steps: int | None
) -> tuple[MemoryState, list[dict[str, Any]]]:
    """States of documents, and the place in its document that each was written from.

    A document longer than the trained length gets a state for each segment. With an adapter that was trained to refuse,
    so does every document longer than a segment, because it can tell which of several states holds an answer.
    """
    config = pipeline.model.active_peft_config
    trained = config.trained_length
    most = trained if config.refusal is None else config.segment_tokens
    texts: list[str] = []
    places: list[dict[str, Any]] = []
    for document in documents:
        text = document.text.strip()
        tokens = 0 if trained is None else len(pipeline.tokenizer(text, verbose=False)["input_ids"])
        if most is None or tokens <= most:
            texts.append(text)
            places.append({"source": document.source, "start": None, "end": None})
            continue
        segments = list(pipeline.segments(text))
        texts += [segment.text for segment in segments]
        places += [{"source": document.source, "start": one.start, "end": one.end} for one in segments]
        if tokens > trained:
            written = f", {sum(one.tokens for one in segments):,} in all ({REPEATED})"
            counts = written if _overlap(places[-len(segments) :]) else ""
            warnings.warn(
                f"{document.source} has {tokens:,} tokens, but the adapter was trained on texts of up to {trained:,}. "
                f"It is written in {len(segments):,} segments of up to {config.segment_tokens:,}{counts}. --state "
                "keeps them; gradmem write --store also keeps their places.",
                stacklevel=2,
            )
    if config.refusal is None:
        _check_room(pipeline, len(texts))
    return pipeline.write_many(texts, steps=steps), places


def _check_room(pipeline: GradMemPipeline, states: int) -> None:
    """Raise before the work if this many states, read side by side, leave no positions for a question."""
    config, most = pipeline.model.active_peft_config, pipeline.model.positions
    vectors = (states - 1) * config.num_memory_tokens + config.prefix_length
    if most is not None and vectors >= most:
        raise ValueError(
            f"The texts need {counted(states, 'state')} with {counted(vectors, 'position')}, but the model has only "
            f"{most:,}, also for the question: this adapter was not trained to refuse, so it reads all states side by "
            "side. Use a store, and ask a few states at a time: gradmem write --store, gradmem ask --store."
        )


def _overlap(places: Sequence[dict[str, Any]]) -> bool:
    """Whether neighbouring segments of a text overlap."""
    return any(
        one["source"] == other["source"] and other["start"] is not None and other["start"] < one["end"]
        for one, other in itertools.pairwise(places)
    )


def _kept(pipeline: GradMemPipeline, state: Path) -> tuple[MemoryState, list[dict[str, Any]]]:
    """The states in a file that this adapter wrote."""
    from gradmem_adapter import MemoryState

    states = MemoryState.load(state)
    pipeline.model.prefix_embeddings(states)  # raises before any output if another model wrote them
    numbers = range(1, len(states) + 1)
    return states, [{"source": f"{state}, state {number}", "start": None, "end": None} for number in numbers]


def _chosen(
    store: MemoryStore, pipeline: GradMemPipeline, question: str, k: int, source: str | None
) -> tuple[MemoryState | None, list[dict[str, Any]]]:
    """The states that a question needs; None if no text in the store matches it."""
    chosen = store.choose(pipeline, question, k, source=source)
    states = store.get([choice.entry.key for choice in chosen], pipeline.model.fingerprint()) if chosen else None
    named = ("key", "source", "start", "end")
    return states, [
        {name: getattr(one.entry, name) for name in named} | {"whole": store.is_whole(one.entry), "score": one.score}
        for one in chosen
    ]


def _check_questions(questions: Sequence[str]) -> None:
    for question in questions:
        if not question.strip():
            raise ValueError("A question is empty. Leave it out.")
        if os.path.exists(question):
            raise ValueError(
                f"The question {question!r} is the name of a file. Ask about it with --text {question}; put a pattern "
                "for several files in quotes: --text '*.txt'."
            )


def _check_memories(
    given: Sequence[str] | None, documents: Sequence[Document], state: Path | None, store: MemoryStore | None
) -> None:
    """Raise before the work unless there is exactly one thing to ask: texts, a saved state or a store."""
    kept = state is not None and state.exists()
    if given and not documents:
        raise ValueError(f"There is no text in {', '.join(given)}.")
    if store is not None:
        if documents or state is not None:
            raise ValueError("--store cannot be combined with --text or --state: leave one or the other out.")
    elif documents and kept:
        raise ValueError(f"{state} exists. To ask it, leave the texts out; to save a new memory, name another file.")
    elif not documents and state is not None and not kept:
        raise FileNotFoundError(f"There is no memory state {str(state)!r}. To save one there, pass texts with --text.")
    elif not documents and not kept:
        raise ValueError("There is nothing to ask about: pass --text, --state with an existing file, or --store.")
    elif state is not None and documents:
        check_writable(state)
