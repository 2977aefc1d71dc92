"""Choosing the state that a question needs: how often it is among the k chosen states, and how long choosing takes.

    python -m benchmarks.choose data/squad [--states 2067 10000] [--k 1 4] [--embedding] [--questions 1000]

There is a state for each passage of the test split, and for passages of the training split if more states are needed;
their vectors are neither read nor written. Every question of the test split is asked, or `--questions` spread evenly
over it. With `--embedding`, all-MiniLM-L6-v2 is used in addition to the words.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import common
from evaluation.data import qa_rows
from evaluation.methods.extractive import embed
from gradmem_adapter.store import Embedding, Entry
from gradmem_adapter.store.choose import choose
from gradmem_adapter.store.index import Index, insert

MINILM = Embedding("all-MiniLM-L6-v2", embed)


def measure(passages: Sequence[str], questions: Sequence[tuple[str, int]], args: Namespace) -> dict[str, float]:
    """Shares of questions whose passage is among the chosen ones, and the time of one choice in milliseconds."""
    embedding = MINILM if args.embedding else None
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder))
        index.make()
        with index.writing() as connection:
            for i, passage in enumerate(passages):
                insert(connection, [Entry(f"{i:032x}", text=passage)])
        choose(index, "", "What is embedded now?", 1, None, embedding)
        ranks, wall, processor = [], [], []
        for question, own in questions:
            clock, cpu = time.perf_counter(), time.process_time()
            chosen = [int(choice.entry.key, 16) for choice in choose(index, "", question, max(args.k), None, embedding)]
            wall.append(time.perf_counter() - clock)
            processor.append(time.process_time() - cpu)
            ranks.append(chosen.index(own) if own in chosen else max(args.k))
    shares = {f"right_of_{k}": sum(rank < k for rank in ranks) / len(ranks) for k in args.k}
    times = {"milliseconds": wall, "processor_milliseconds": processor}
    return shares | {name: 1000 * statistics.median(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "choose")
    parser.add_argument("source", help="a directory or a dataset, as evaluation/README.md describes them")
    parser.add_argument("--states", type=int, nargs="+", default=[2067, 10_000])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4], help="how many states to choose")
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--questions", type=int, help="how many to ask, spread over all; default: all")
    args = parser.parse_args(argv)
    rows = qa_rows(args.source, "test")
    questions = [(str(query), i) for i, row in enumerate(rows) for query in row["queries"]]
    questions = questions[:: max(1, len(questions) // (args.questions or len(questions)))]
    passages = [row["context"] for row in rows]
    if max(args.states) > len(passages):
        passages += [row["context"] for row in qa_rows(args.source, "train")]
    for states in args.states:
        of_these = [(question, own) for question, own in questions if own < states]
        method = "words and embedding" if args.embedding else "words"
        common.record(
            args, "choose", method, partial(measure, passages[:states], of_these, args),
            states=min(states, len(passages)), questions=len(of_these),
        )  # fmt: skip


if __name__ == "__main__":
    main()
