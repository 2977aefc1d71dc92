"""Write questions about a source of texts to a file, keeping those that a writer answers consistently and surely."""

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
"""Passages per part: an interruption loses the questions of one part at most."""


@dataclass(frozen=True)
class Writing:
    """The settings for writing questions.

    Args:
        writer (`str`): the path of a writer, from `train_writer`.
        source (`str`): where the texts are, see `passages`.
        kind (`str`): the kind of the texts, one that the writer was trained on.
        split (`str`): the split of the source.
        limit (`int`, *optional*): the most passages.
        longest (`int`): the most tokens in a passage.
        tokens (`int`): the most tokens in a batch, including padding.
        agreement (`float`): the least F1 between the two answers to a question.
        support (`float`): the least mean log probability of an answer's tokens.
        seed (`int`): seed for all random choices.
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
    """Write JSON lines for `qa_rows`: context, query, target, and support, a mean log probability.

    The same call resumes an interrupted one. Processes started by torchrun or accelerate launch share the work.

    Args:
        writing: the settings.
        output: a `.jsonl` or `.jsonl.gz` file. Until it is complete, a directory beside it holds the finished parts.
        device: where the writer runs.
        show: called with lines about progress.

    Raises:
        BlockingIOError: another call is writing the file.
        FileExistsError: `output` exists.
        ValueError: `output` has another suffix, the interrupted call had other settings, or no question is left.
    """
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"The output must be a .jsonl or .jsonl.gz file, got {str(output)!r}.")
    if output.exists():
        raise FileExistsError(f"{output} exists. Pass another file as --output, or delete it.")
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
        raise ValueError("No question is left: train the writer for longer, or lower --agreement and --support.")
    with replacing(output) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if output.suffix == ".gz" else data)
