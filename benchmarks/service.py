"""The load of a service on LangChain's chat model: concurrent requests on a few documents, with and without batches.

    python -m benchmarks.service checkpoints/smollm2-135m-qa [--requests 50] [--rounds 6] [--max-batch 1 16]

Each request is one call of a chain from `create_gradmem_stuff_chain`, with a question and a document, which is written
if it is new. All requests of a round arrive at once, and the first round begins with an empty store. There is one
record for each `max_batch`, the most calls that are answered together; 1: one after another.

    requests_per_second: the median of the rounds after the first; `cold_requests_per_second` is that of the first.
    writes: states written in all rounds; equals the number of documents if none is written twice.
    errors: requests that raised, in all rounds.
    right: share of requests whose answer contains what was asked for.
    growth_mib: growth of resident memory from the end of the second round to the end of the last.
    alone_ms, after_cancelled_ms: a request alone, and one right after the requests of a round were cancelled.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from argparse import Namespace
from functools import partial
from typing import Any

import psutil
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_gradmem import ChatGradMem, MemoryStateStore, create_gradmem_stuff_chain

from benchmarks import common
from gradmem_adapter import GradMemPipeline, load_checkpoint

PEOPLE = [
    ("Mara", "baker", "Vell", "violin", "Biscuit"), ("Otto", "doctor", "Tarn", "flute", "Pepper"),
    ("Ines", "painter", "Orm", "drum", "Daisy"), ("Paul", "farmer", "Lisbon", "trumpet", "Rex"),
    ("Rosa", "teacher", "Bergen", "piano", "Luna"), ("Karl", "sailor", "Krakow", "harp", "Bruno"),
    ("Lena", "judge", "Porto", "guitar", "Coco"), ("Hugo", "butcher", "Malmo", "cello", "Max"),
    ("Ada", "nurse", "Basel", "organ", "Milo"), ("Finn", "pilot", "Turin", "banjo", "Nala"),
]  # fmt: skip
CANCEL_AFTER = 0.2
"""Seconds before requests are cancelled: by then, some are being answered and others are waiting."""


def requests(count: int) -> list[tuple[dict[str, Any], str]]:
    """Inputs of a chain, and what each answer must contain: the next question on each document in turn."""
    found = []
    for i in range(count):
        name, work, town, instrument, dog = PEOPLE[i % len(PEOPLE)]
        text = f"{name} works as a {work}. {name} lives in {town} and plays the {instrument}. The dog is called {dog}."
        asked = [
            (f"What does {name} work as?", work), (f"Where does {name} live?", town),
            (f"What does {name} play?", instrument), ("What is the dog called?", dog), ("Who plays?", name),
        ]  # fmt: skip
        question, answer = asked[i // len(PEOPLE) % len(asked)]
        found.append(({"context": [Document(text)], "question": question}, answer))
    return found


async def round_of(chain: Runnable[Any, str], asked: list[tuple[dict[str, Any], str]]) -> tuple[float, int, int]:
    """Seconds until all are answered, how many raised, and how many are right."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(chain.ainvoke(inputs) for inputs, _ in asked), return_exceptions=True)
    seconds = time.perf_counter() - start
    texts = [answer if isinstance(answer, str) else None for answer in answers]
    right = sum(text is not None and word.lower() in text.lower() for text, (_, word) in zip(texts, asked, strict=True))
    return seconds, texts.count(None), right


async def after_cancelled(chain: Runnable[Any, str], asked: list[tuple[dict[str, Any], str]]) -> tuple[float, float]:
    """Milliseconds of one request: alone, and right after others were cancelled."""

    async def one() -> float:
        start = time.perf_counter()
        await chain.ainvoke(asked[0][0])
        return 1000 * (time.perf_counter() - start)

    alone = statistics.median([await one() for _ in range(3)])
    tasks = [asyncio.ensure_future(chain.ainvoke(inputs)) for inputs, _ in asked]
    await asyncio.sleep(CANCEL_AFTER)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return alone, await one()


async def measure(pipeline: GradMemPipeline, max_batch: int, args: Namespace) -> dict[str, float]:
    """All rounds of one `max_batch`, with a new store."""
    chat = ChatGradMem(pipeline=pipeline, store=MemoryStateStore(), max_batch=max_batch, max_tokens=args.max_tokens)
    chain = create_gradmem_stuff_chain(chat, ChatPromptTemplate.from_messages([("human", "{context}{question}")]))
    asked = requests(args.requests)
    seconds, memory, errors, right = [], [], 0, 0
    for _ in range(args.rounds):
        took, failed, found = await round_of(chain, asked)
        seconds.append(took)
        memory.append(psutil.Process().memory_info().rss)
        errors, right = errors + failed, right + found
    alone, after = await after_cancelled(chain, asked)
    return {
        "requests_per_second": args.requests / statistics.median(seconds[1:]),
        "cold_requests_per_second": args.requests / seconds[0],
        "writes": chat.store.writes,
        "errors": errors,
        "right": right / (args.rounds * args.requests),
        "growth_mib": (memory[-1] - memory[1]) / 2**20,
        "alone_ms": alone,
        "after_cancelled_ms": after,
    }


def run(pipeline: GradMemPipeline, max_batch: int, args: Namespace) -> dict[str, float]:
    """Run `measure` in a new event loop."""
    return asyncio.run(measure(pipeline, max_batch, args))


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "service")
    parser.add_argument("checkpoint", help="a directory with an adapter")
    parser.add_argument("--requests", type=int, default=50, help="requests per round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--max-tokens", type=int, default=8, help="the most tokens in an answer")
    args = parser.parse_args(argv)
    args.model = args.checkpoint
    model, tokenizer = load_checkpoint(args.checkpoint, device=args.device, dtype=common.DTYPES[args.dtype])
    pipeline = GradMemPipeline(model, tokenizer)
    for max_batch in args.max_batch:
        common.record(
            args, "service", "langchain", partial(run, pipeline, max_batch, args),
            requests=args.requests, documents=min(len(PEOPLE), args.requests), rounds=args.rounds, max_batch=max_batch,
        )  # fmt: skip


if __name__ == "__main__":
    main()
