"""Questions about passages: file formats, grouping, scores."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.data import contexts, distractors, group, joined, parse, qa_rows
from evaluation.scores import score_texts
from evaluation.tasks.babi import babi_rows, read_babi

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def own(tmp_path):
    shutil.copy(DATA / "fairytale.jsonl", tmp_path / "test.jsonl")
    return tmp_path


def test_our_files_are_grouped_by_context(own):
    lines = [json.loads(line) for line in (DATA / "fairytale.jsonl").read_text().splitlines()]
    rows = qa_rows(own, "test")
    assert [row["context"] for row in rows] == list(dict.fromkeys(line["context"] for line in lines))
    for row in rows:
        mine = [line for line in lines if line["context"] == row["context"]]
        assert row["queries"] == [line["query"] for line in mine]
        assert row["targets"] == [line["target"] for line in mine]
        assert [set(accepted) for accepted in row["answers"]] == [{l["target"], *l["answers"]} for l in mine]  # noqa: E741
    (own / "test.jsonl.gz").write_bytes(gzip.compress((own / "test.jsonl").read_bytes()))
    (own / "test.jsonl").unlink()
    assert qa_rows(str(own), "test") == rows


def test_squads_original_files_are_read(tmp_path):
    answers = [{"text": "Paris", "answer_start": 0}, {"text": "Paris", "answer_start": 0}, {"text": "the city"}]
    asked = [{"question": "Where?", "answers": answers}, {"question": "Why?", "answers": [], "is_impossible": True}]
    paragraphs = [{"context": "In Paris.", "qas": asked}, {"context": "Nothing.", "qas": asked[1:]}]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"version": "2", "data": [{"paragraphs": paragraphs}]}))
    assert qa_rows(tmp_path, "dev") == [
        {"context": "In Paris.", "queries": ["Where?"], "targets": ["Paris"], "answers": [["Paris", "the city"]]}
    ]
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="not in SQuAD's format"):
        qa_rows(tmp_path, "bad")


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"context": "c", "query": "q", "target": "b", "answers": ["a", "b"]}, ["b", "a"]),
        (
            {"context": "c", "question": "q", "answers": {"text": ["a", "a", "b"], "answer_start": [0, 0, 1]}},
            ["a", "b"],
        ),
        ({"content": "c", "question": "q", "answer": "a", "target": "q", "references": ["q"]}, ["a"]),
        ({"story_section": "c", "question": "q", "answer1": "a", "answer2": "b"}, ["a", "b"]),
        ({"passage": "c", "question": "q", "answer": "a", "task": 1}, ["a"]),
        ({"context": "c", "question": "q", "answers": {"text": []}}, []),
        ({"context": "c", "question": "q", "answers": "the hall"}, ["the hall"]),
        ({"context": "c", "question": "q", "answers": [{"text": "a"}, {"text": "b"}]}, ["a", "b"]),
        ({"context": "c", "question": "q", "answer": " "}, []),
        ({"context": "c", "question": "q", "answer": None}, []),
        ({"context": "c", "query": "q", "target": "", "answers": []}, []),
    ],
)
def test_known_record_formats_are_parsed(record, answers):
    assert parse(record) == ("c", "q", answers)


def test_unknown_formats_and_missing_files_are_refused(own):
    with pytest.raises(ValueError, match="fields text, label, but needs a context"):
        parse({"text": "c", "label": 1})
    with pytest.raises(ValueError, match="but needs a context"):
        parse({"context": "c", "question": "q"})
    (own / "texts.jsonl").write_text('{"passage": "c"}\n{"passage": "d"}\n{"passage": "c"}\n')
    assert contexts(own, "texts") == ["c", "d"]
    (own / "texts.jsonl").write_text('{"text": "c"}\n')
    with pytest.raises(ValueError, match="fields text, but needs a context"):
        contexts(own, "texts")
    with pytest.raises(ValueError, match="fields span, but needs text"):
        parse({"context": "c", "question": "q", "answers": {"span": [0, 3]}})
    with pytest.raises(FileNotFoundError, match=r"It has test\.jsonl"):
        qa_rows(own, "train")
    (own / "blind.jsonl").write_text('{"context": "c", "question": "q", "answer": ""}\n')
    with pytest.raises(ValueError, match=r"No question in the split 'blind' .* has an answer"):
        qa_rows(own, "blind")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(), st.lists(st.text(min_size=1), max_size=2))))
def test_grouping_keeps_every_answered_question_in_order(questions):
    rows = group((context, str(query), answers) for context, query, answers in questions)
    assert len({row["context"] for row in rows}) == len(rows)
    for row in rows:
        mine = [(str(query), answers) for context, query, answers in questions if context == row["context"] and answers]
        assert list(zip(row["queries"], row["answers"], strict=True)) == mine
        assert row["targets"] == [answers[0] for _, answers in mine]
    assert sum(len(row["queries"]) for row in rows) == sum(bool(answers) for _, _, answers in questions)


def test_hub_datasets_are_read(own):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(
        [{"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}, "task": 2}]
    )
    directory = own / "hub" / "data"
    directory.mkdir(parents=True)
    table.to_parquet(directory / "validation-00000.parquet")
    assert qa_rows(own / "hub", "validation")[0]["answers"] == [["a"]]
    assert babi_rows(own / "hub", 2, "validation") == [{"context": "c", "query": "q", "target": "a"}]
    with pytest.raises(ValueError, match="no task 3"):
        babi_rows(own / "hub", 3, "validation")


def test_the_error_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"gradmem-adapter\[evaluation\]"):
        qa_rows("someone/some-dataset", "train")


def test_texts_are_scored_against_several_references():
    scores = score_texts("The golden hair.", ["golden hair", "no one"])
    assert scores["exact_match"] == scores["f1"] == 1
    assert scores["rouge_l"] == pytest.approx(0.8)
    partly = score_texts("hair of gold", ["golden hair"])
    assert 0 < partly["rouge_l"] < 1
    assert partly["exact_match"] == 0
    assert score_texts("", ["a b"]) == {"exact_match": 0, "f1": 0, "rouge_l": 0}


# -------------------------------------------------------------------- bAbI


def test_our_babi_files_are_read():
    rows = babi_rows(DATA, 2, "test")
    assert rows[0]["query"].endswith("?")
    assert rows[0]["target"] in rows[0]["context"]
    assert len(rows) == 6
    with pytest.raises(FileNotFoundError, match="has no qa3_test"):
        babi_rows(DATA, 3, "test")


def test_babi_is_read_from_the_hub(monkeypatch):
    found = [{"passage": f"c{task}", "question": "q", "answer": "a", "task": task} for task in (1, 2, 1)]
    asked = []

    def load(*args, **options):
        asked.append((*args, options))
        return found

    monkeypatch.setattr("evaluation.tasks.babi.load_from_hub", load)
    assert babi_rows("some/babi", 2, "test", revision="r") == [{"context": "c2", "query": "q", "target": "a"}]
    assert asked == [("some/babi", "test", {"revision": "r"})]
    assert len(babi_rows("some/babi", 1, "test")) == 2
    with pytest.raises(ValueError, match="no task 3 in its split 'test'"):
        babi_rows("some/babi", 3, "test")
    found[1]["answer"] = ""
    with pytest.raises(ValueError, match="'q' has no answer"):
        babi_rows("some/babi", 2, "test")
    del found[0]["task"]
    with pytest.raises(ValueError, match="no column 'task'; its columns are passage, question, answer"):
        babi_rows("some/babi", 1, "test")


def test_babis_original_files_are_read(tmp_path):
    story = "1 Mary moved to the bathroom.\n2 John went home.\n3 Where is Mary? \tbathroom\t1\n4 Mary left.\n"
    story += "5 Where is John?\thome\t2\n1 Ann sat.\n2 Who sat?\tAnn\t1\n"
    (tmp_path / "qa1_single-supporting-fact_train.txt").write_text(story)
    assert babi_rows(tmp_path, 1, "train") == [
        {"context": "Mary moved to the bathroom. John went home.", "query": "Where is Mary?", "target": "bathroom"},
        {
            "context": "Mary moved to the bathroom. John went home. Mary left.",
            "query": "Where is John?",
            "target": "home",
        },
        {"context": "Ann sat.", "query": "Who sat?", "target": "Ann"},
    ]
    (tmp_path / "qa1_x_test.txt").write_text("no number\n")
    with pytest.raises(ValueError, match="line 1: expected a number"):
        read_babi(tmp_path / "qa1_x_test.txt")
    (tmp_path / "qa2_x_test.txt").write_text("1 Mary moved to the attic.\n")
    with pytest.raises(ValueError, match=r"qa2_x_test\.txt has no question"):
        read_babi(tmp_path / "qa2_x_test.txt")


def test_distractors_are_random_and_include_the_own_context():
    reads = distractors([0, 1, 2, 2], 5, 3, seed=0)
    assert all(own in row and len(set(row)) == 3 for own, row in zip([0, 1, 2, 2], reads, strict=True))
    assert reads == distractors([0, 1, 2, 2], 5, 3, seed=0)
    assert {row.index(7) for row in distractors([7] * 50, 9, 4, seed=0)} == {0, 1, 2, 3}
    assert distractors([3], 9, 1, seed=0) == [[3]]
    with pytest.raises(ValueError, match="Got 2 contexts, but questions"):
        distractors([0], 2, 3, seed=0)


def passages(count):
    """Passages with two questions each, numbered like their passage."""
    return [
        {"context": f"c{i}", "queries": [f"q{i}", f"r{i}"], "targets": ["a", "b"], "answers": [["a"], ["b", "c"]]}
        for i in range(count)
    ]


def test_consecutive_passages_are_joined_into_one_context():
    made = joined(passages(50), 4)
    assert joined(passages(50), 1) == passages(50)
    assert [name for row in made for name in row["context"].split("\n")] == [f"c{i}" for i in range(50)]
    assert {len(row["context"].split("\n")) for row in made} == {1, 2, 3, 4}
    for row in made:
        wanted = [query for name in row["context"].split("\n") for query in (f"q{name[1:]}", f"r{name[1:]}")]
        assert row["queries"] == wanted
        assert len(row["targets"]) == len(row["answers"]) == len(wanted)
    assert joined(passages(50), 4) == made
