"""Plain text as training data: passages and what comes next in them."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny, tiny_text, tiny_tokenizer

from evaluation import write_texts
from evaluation.tasks import Passages, PlainText, plain_text
from evaluation.tasks.plain_text import CONTINUATION, CUE, QUESTIONS, SHORTEST


def words(count, first=0):
    return [f"w{i}" for i in range(first, first + count)]


def test_every_target_is_what_comes_next(tmp_path):
    (tmp_path / "train.txt").write_text(" ".join(words(40)) + "\n\n" + " ".join(words(30, 50)) + "\n", "utf-8")
    rows = PlainText(source=str(tmp_path)).rows("train")
    assert [row["context"].split()[0] for row in rows if row["context"].startswith(("w0 ", "w50 "))] == ["w0", "w50"]
    for row in rows:
        text = row["context"].split()
        assert len(row["queries"]) == len(row["targets"]) == QUESTIONS
        for query, target in zip(row["queries"], row["targets"], strict=True):
            cue = query.removeprefix('What comes after "').removesuffix('"?').split()
            place = text.index(cue[0])
            assert text[place : place + CUE] == cue
            assert text[place + CUE : place + CUE + CONTINUATION] == target.split() != []
    assert PlainText(source=str(tmp_path)).rows("train") == rows


@given(st.integers(0, 2000), st.integers(2 * SHORTEST, 400))
def test_passages_are_the_text_in_its_order(count, longest):
    """Nothing is repeated or out of order, and only an end that is too short for a passage is left out."""
    passages = list(plain_text._passages(words(count), longest))
    assert all(SHORTEST <= len(passage) <= longest for passage in passages)
    joined = [word for passage in passages for word in passage]
    assert joined == words(len(joined))
    assert count - len(joined) < SHORTEST


def test_what_comes_after_a_passage_can_be_asked_too(tmp_path):
    (tmp_path / "train.txt").write_text(" ".join(words(300)))
    plain, more = (PlainText(source=str(tmp_path), longest=40, continued=n).rows("train") for n in (0, 9))
    assert [row["context"] for row in plain] == [row["context"] for row in more]
    for row, asked, following in zip(plain, more, more[1:], strict=False):
        assert asked["queries"][:-1] == row["queries"]
        assert asked["queries"][-1] == f'What comes after "{" ".join(row["context"].split()[-CUE:])}"?'
        assert asked["targets"] == [*row["targets"], " ".join(following["context"].split()[:9])]
    assert more[-1] == plain[-1]


def test_contexts_of_question_files_count_as_texts(tmp_path):
    record = {"context": " ".join(words(20)), "query": "Why?", "target": "So."}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    (row,) = PlainText(source=str(tmp_path)).training_rows()
    assert row["context"] == record["context"]
    assert "Why?" not in row["queries"]
    assert [row["queries"] for row in Passages(source=str(tmp_path)).rows("train")] == [["Why?"]]


def test_a_gzipped_text_is_read_and_a_short_one_refused(tmp_path):
    with gzip.open(tmp_path / "train.txt.gz", "wt") as file:
        file.write(" ".join(words(SHORTEST)))
    (row,) = PlainText(source=str(tmp_path)).rows("train")
    assert row["context"].split() == words(SHORTEST)
    (tmp_path / "valid.txt").write_text("too short\n")
    with pytest.raises(ValueError, match=f"has 1 text, but none with {SHORTEST} words"):
        PlainText(source=str(tmp_path)).rows("valid")
    with pytest.raises(FileNotFoundError, match=r"has no test\.jsonl"):
        PlainText(source=str(tmp_path)).rows("test")


def test_texts_written_by_a_model_can_be_read(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    (tmp_path / "given").mkdir()
    (tmp_path / "own").mkdir()
    given = tiny_text(40)
    (tmp_path / "given" / "train.txt").write_text(given + "\n")
    output = tmp_path / "own" / "train.txt.gz"
    command = ["--count", "5", "--batch", "2", "--tokens", "30", "--backbone", tmp_path / "backbone"]
    monkeypatch.setattr("sys.argv", list(map(str, ["write_texts.py", tmp_path / "given", output, *command])))
    write_texts.main()
    texts = gzip.decompress(output.read_bytes()).decode().splitlines()
    assert len(texts) == 5
    assert all(" ".join(text.split()[:12]) in given for text in texts)
    assert any(len(row["context"].split()) > 12 for row in PlainText(source=str(output.parent)).rows("train"))
