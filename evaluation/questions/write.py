"""Questions on a source of texts, in a file: those that a writer answers the same a second time, and surely enough."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from gradmem_adapter.training.metrics import score_answer
from gradmem_adapter.utils.fields import claimed
from gradmem_adapter.utils.files import check_writable, replacing
from gradmem_adapter.utils.wording import counted

from .passages import passages
from .writer import Writer

PART = 1024
"""Passages whose questions are kept at a time: no more are lost by an interruption."""


@dataclass(frozen=True)
class Writing:
    """What is written.

    Args:
        writer (`str`): what `train_writer` made.
        source (`str`): where the texts are, see `passages`.
        kind (`str`): of the texts, one of those that the writer has learned from.
        split (`str`): of the source.
        limit (`int`, *optional*): only so many passages.
        longest (`int`): tokens of a passage.
        tokens (`int`): of a batch, padding counted.
        agreement (`float`): least F1 of the two answers to a question.
        support (`float`): least mean log probability of an answer's tokens.
        seed (`int`): of what is drawn.
    """

    writer: str
    source: str
    kind: str
    split: str = "train"
    limit: int | None = None
    longest: int = 400
    tokens: int = 2**16
    agreement: float = 0.5
    support: float = -0.5
    seed: int = 0


def write_questions(writing: Writing, output: Path, device: torch.device, show: Callable[[str], None]) -> None:
    """Write JSON lines as `qa_rows` reads them: context, query, target, and support, a mean log probability.

    The same call goes on where an interrupted one was. Processes that torchrun or accelerate launch started share the
    work.

    Args:
        writing: what is written.
        output: a `.jsonl` or `.jsonl.gz` file. A directory beside it holds what was written until all is.
        device: where the writer runs.
        show: told how far it is.

    Raises:
        BlockingIOError: another call is writing it.
        FileExistsError: `output` is there.
        ValueError: it has another name, what was begun had other settings, or nothing is written.
    """
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"Questions are written to a .jsonl or .jsonl.gz file, not to {str(output)!r}.")
    if output.exists():
        raise FileExistsError(f"{output} exists. Give --output another file, or delete it.")
    check_writable(output)
    state, parts = PartialState(cpu=device.type == "cpu"), output.with_name(f"{output.name}.parts")
    with claimed(parts / "settings.json", asdict(writing), state):
        writer = Writer(writing.writer, writing.kind, device, writing.tokens)
        found = passages(writing.source, writing.split, writer.tokenizer, writing.longest, random.Random(writing.seed))
        texts = list(islice(found, writing.limit))
        if not texts:
            raise ValueError(f"{writing.source!r} has no passage of at most {writing.longest} tokens to ask about.")
        files = [parts / f"{first:08d}.jsonl" for first in range(0, len(texts), PART)]
        for number in range(state.process_index, len(files), state.num_processes):
            if not files[number].exists():
                set_seed(random.Random(f"{writing.seed}:{number}").getrandbits(32))
                rows = list(_rows(texts[number * PART : (number + 1) * PART], writer, writing))
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                with replacing(files[number]) as temporary:
                    temporary.write_text("".join(lines), encoding="utf-8")
                show(f"Part {number + 1} of {len(files)}: {counted(len(rows), 'question')}")
        state.wait_for_everyone()
        if state.is_main_process:
            _join(files, output)
            shutil.rmtree(parts)


def _rows(texts: Sequence[str], writer: Writer, writing: Writing) -> Iterator[dict[str, Any]]:
    asked = writer.ask(texts)
    answers = writer.answer([texts[i] for i, _, _ in asked], [question for _, question, _ in asked])
    for (i, question, first), (answer, support) in zip(asked, answers, strict=True):
        if answer and support >= writing.support and score_answer(answer, [first])["f1"] >= writing.agreement:
            yield {"context": texts[i], "query": question, "target": answer, "support": round(support, 3)}


def _join(files: Sequence[Path], output: Path) -> None:
    data = b"".join(file.read_bytes() for file in files)
    if not data:
        raise ValueError(
            "No question is left: the writer must learn longer, or --agreement and --support ask too much."
        )
    with replacing(output) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if output.suffix == ".gz" else data)
