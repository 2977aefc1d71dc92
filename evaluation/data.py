"""Read texts and questions: from files and datasets on the hub, in all known forms of records."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from gradmem_adapter.prompts import Prompt
from gradmem_adapter.store.choose import choose
from gradmem_adapter.store.entry import Entry
from gradmem_adapter.store.index import Index, insert
from gradmem_adapter.training.collator import read_row
from gradmem_adapter.training.rows import json_lines
from gradmem_adapter.utils.fields import from_json
from gradmem_adapter.utils.files import read_text
from gradmem_adapter.utils.wording import counted

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Contexts with queries and targets, as `GradMemCollator` takes them."""
Passage: TypeAlias = list[int]
"""Token ids."""
_CONTEXT = ("context", "passage", "content", "story_section")
_QUERY = ("query", "question")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
"""The boundary between two sentences; an initial does not end a sentence."""


def qa_rows(source: str | Path, split: str, **hub_options: Any) -> list[dict[str, Any]]:
    """Passages with all questions on them, as `GradMemCollator` takes them, in order of first appearance.

    Args:
        source: a directory with `<split>.jsonl` (or `.jsonl.gz`), one question per line, or with SQuAD's own
            `<split>.json`, `<split>-v1.1.json` or `<split>-v2.0.json`; otherwise what `datasets.load_dataset` takes.
        split: "train", "valid", "test", or the dataset's own name of a split.
        hub_options: for `datasets.load_dataset`: name, revision, ...

    Returns:
        {"context", "queries", "targets", "answers": the accepted answers of each query}. Questions without an answer
        (SQuAD 2.0 has some) are left out.

    Raises:
        FileNotFoundError: the directory has no such split; the message lists its files.
        ValueError: records have an unknown form; the message names their fields. Or no question has an answer.
        ImportError: the hub is needed, and the package `datasets` is not installed.
    """
    rows = group(parse(record) for record in records(source, split, **hub_options))
    if not rows:
        raise ValueError(f"No question in the split {split!r} of {str(source)!r} has an answer.")
    return rows


def records(source: str | Path, split: str, **hub_options: Any) -> Iterable[Mapping[str, Any]]:
    """The questions of a directory or a dataset on the hub one by one, in their original form."""
    directory = Path(source)
    if not directory.is_dir():
        return load_from_hub(str(source), split, **hub_options)
    for suffix in (".jsonl", ".jsonl.gz"):
        if (file := directory / f"{split}{suffix}").is_file():
            return [record for _, record in json_lines(file)]
    for suffix in (".json", "-v1.1.json", "-v2.0.json"):
        if (file := directory / f"{split}{suffix}").is_file():
            return squad_file(file)
    if has_tables(directory):
        return load_from_hub(str(source), split, **hub_options)
    there = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
    raise FileNotFoundError(f"{directory} has no {split}.jsonl, {split}.jsonl.gz or {split}.json. It has {there}.")


def text_lines(source: str | Path, split: str) -> list[str] | None:
    """The lines of a directory's `<split>.txt` (or `.txt.gz`) that are not empty; None if it has no such file."""
    for suffix in (".txt", ".txt.gz"):
        if (file := Path(source) / f"{split}{suffix}").is_file():
            return [line for line in read_text(file).split("\n") if line.strip()]
    return None


def contexts(source: str | Path, split: str, **hub_options: Any) -> list[str]:
    """The passages of a source of `records`, with or without questions.

    Raises:
        ValueError: a record has no context; the message names its fields.
    """
    found: dict[str, None] = {}
    for record in records(source, split, **hub_options):
        name = next((name for name in _CONTEXT if record.get(name)), None)
        if name is None:
            raise ValueError(
                f"A record has the fields {', '.join(record)}, but needs a context ({', '.join(_CONTEXT)})."
            )
        found[str(record[name])] = None
    return list(found)


def has_tables(directory: Path) -> bool:
    """Whether a directory holds a dataset in the hub's format, which `datasets` loads by its path."""
    return any(directory.glob("*.parquet")) or any(directory.glob("*/*.parquet"))


def load_from_hub(source: str, split: str, **options: Any) -> Iterable[Mapping[str, Any]]:
    """A split of a dataset, loaded with the package `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a directory, and datasets on the hub need: pip install 'gradmem-adapter[evaluation]'."
        ) from error
    return load_dataset(source, split=split, **options)


def squad_file(path: Path) -> Iterable[dict[str, Any]]:
    """The questions of a file in SQuAD's original format: articles, paragraphs, questions."""
    try:
        articles = from_json(read_text(path), str(path))["data"]
        return [
            {"context": paragraph["context"], "question": question["question"],
             "answers": {"text": [answer["text"] for answer in question["answers"]]}}
            for article in articles for paragraph in article["paragraphs"] for question in paragraph["qas"]
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in SQuAD's format: {type(error).__name__} {error}.") from error


def parse(record: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """Context, question and accepted answers of a record in any of the known forms.

    Raises:
        ValueError: it has an unknown form; the message names its fields.
    """
    context, query = (next((name for name in names if record.get(name)), None) for names in (_CONTEXT, _QUERY))
    if context is not None and query is not None:
        found = _answers(record, own_form=query == "query")
        if found is not None:
            return str(record[context]), str(record[query]), [text for text in dict.fromkeys(found) if text.strip()]
    raise ValueError(
        f"A record has the fields {', '.join(record) or 'none'}, but needs a context ({', '.join(_CONTEXT)}), a "
        f"question ({', '.join(_QUERY)}) and answers (answers, answer, answer1, or target with query)."
    )


def _answers(record: Mapping[str, Any], own_form: bool) -> list[str] | None:
    """All answers of a record, none if it is unanswered; None if it has no field for them."""
    # The target comes first, as training uses it. (In other forms, a "target" may be something else.)
    forms = [("target", "answers") if own_form else ("answers",), ("answer", "answer1", "answer2")]
    for names in forms:
        if any(record.get(name) is not None for name in names):
            return [text for name in names for text in _texts(record.get(name))]
    return [] if any(name in record for names in forms for name in names) else None


def _texts(value: Any) -> list[str]:
    """The texts in a field of answers: a text, a list, {"text": ...}, or any nesting of these."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        if "text" not in value:
            raise ValueError(f"An answer has the fields {', '.join(value) or 'none'}, but needs text.")
        return _texts(value["text"])
    if isinstance(value, str) or not isinstance(value, Iterable):  # a text is iterable too, but not a list of answers
        return [str(value)]
    return [text for item in value for text in _texts(item)]


def group(questions: Iterable[tuple[str, str, list[str]]]) -> list[dict[str, Any]]:
    """Group questions on the same context into one row."""
    rows: dict[str, dict[str, Any]] = {}
    for context, query, answers in questions:
        if not answers:
            continue
        row = rows.setdefault(context, {"context": context, "queries": [], "targets": [], "answers": []})
        row["queries"].append(query)
        row["targets"].append(answers[0])
        row["answers"].append(answers)
    return list(rows.values())


def questions(rows: Rows) -> tuple[list[str], list[Prompt], list[int], list[list[str]]]:
    """Contexts, queries, the context of each query, and its accepted answers."""
    contexts: list[str] = []
    queries: list[Prompt] = []
    index: list[int] = []
    references: list[list[str]] = []
    for i, row in enumerate(rows):
        example = read_row(f"Row {i}", row)
        contexts.append(example.context)
        queries += example.queries
        index += [i] * len(example.queries)
        references += example.references
    return contexts, queries, index, references


def distractors(index: Sequence[int], contexts: int, states: int, seed: int) -> list[list[int]]:
    """For each query, the contexts that it is asked of: its own at a random position among `states` - 1 others.

    Raises:
        ValueError: there are fewer contexts than states.
    """
    if states > contexts:
        raise ValueError(f"Got {counted(contexts, 'context')}, but questions are asked of {states}: use fewer states.")
    draw, reads = random.Random(seed), []
    for own in index:
        others = draw.sample([i for i in range(contexts) if i != own], states - 1)
        others.insert(draw.randrange(states), own)
        reads.append(others)
    return reads


def joined(rows: Rows, most: int) -> list[dict[str, Any]]:
    """Contexts of one to `most` consecutive passages, usually from one article, with all their questions. The same rows
    give the same contexts."""
    draw, made, rest = random.Random(most), [], [dict(row) for row in rows]
    while rest:
        count = draw.randint(1, most)
        part, rest = rest[:count], rest[count:]
        lists = {name: [x for row in part for x in row[name]] for name in ("queries", "targets", "answers")}
        made.append({"context": "\n".join(row["context"] for row in part)} | lists)
    return made


def cut_passages(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int | None = None) -> list[Passage]:
    """Consecutive passages of exactly `tokens` tokens of running prose; headings (` = Title = `) are left out.

    A passage may continue into the next paragraph. The rest at the end is dropped.

    Raises:
        ValueError: the text is too short for `count` passages, or for one.
    """
    lines = (line.strip() for line in text.splitlines())
    prose = "\n".join(line for line in lines if line and not (line.startswith("= ") and line.endswith(" =")))
    ids = list(tokenizer(prose, add_special_tokens=False)["input_ids"])
    found = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)][:count]
    if len(found) < (1 if count is None else count):
        raise ValueError(
            f"The text has {counted(len(ids), 'token')}, enough for {counted(len(ids) // tokens, 'passage')} of "
            f"{tokens}, not for {count or 'one'}."
        )
    return found


def by_words(texts: Sequence[str], queries: Sequence[str], k: int) -> list[dict[int, float]]:
    """For each question, the k texts that `MemoryStore.choose` would find, best first, with their scores. If no text
    shares a word with it, the first k texts, with score 0."""
    with TemporaryDirectory() as folder:
        index = Index(Path(folder))
        index.make()
        with index.writing() as connection:
            for i, text in enumerate(texts):
                insert(connection, [Entry(f"{i:032x}", text=text)])
        found = [
            {int(one.entry.key, 16): one.score for one in choose(index, "", query, k, None, None)} for query in queries
        ]
    rest = range(min(k, len(texts)))
    return [read | dict.fromkeys([i for i in rest if i not in read][: len(rest) - len(read)], 0.0) for read in found]
