"""Every question that a bAbI story answers."""

from pathlib import Path

import pytest

from evaluation.tasks.babi import Babi, babi_rows, with_every_question

DATA = Path(__file__).parent.parent / "data"


def answers(number, context, query, target):
    (row,) = with_every_question([{"context": context, "query": query, "target": target}], number)
    assert row["queries"][0] == query
    return dict(zip(row["queries"], row["targets"], strict=True))


@pytest.mark.parametrize("number", [1, 2])
def test_the_answers_of_the_data_follow_from_the_facts(number):
    rows = babi_rows(DATA, number, "test")
    made = with_every_question(rows, number)  # raises if the facts say otherwise
    assert {row["context"] for row in made} == {row["context"] for row in rows}
    assert sum(len(row["queries"]) for row in made) > len(rows)


def test_people_are_where_they_went_last():
    story = "Ann went to the hall. Bob moved to the attic. Ann journeyed to the cellar."
    expected = {"Where is Bob?": "attic", "Where is Ann?": "cellar"}
    assert answers(1, story, "Where is Bob?", "attic") == expected


def test_objects_are_where_their_holder_is_or_where_they_were_left():
    story = "Ann took the milk. Ann went to the hall. Bob went to the attic. Bob got the ball. Bob put down the ball."
    expected = {"Where is the milk?": "hall", "Where is the ball?": "attic"}
    assert answers(2, story, "Where is the milk?", "hall") == expected
    moved = f"{story} Bob travelled to the cellar. Ann let go of the milk. Ann went to the attic. Ann took the ball."
    assert answers(2, moved, "Where is the milk?", "hall") == expected
    assert (
        answers(2, f"{moved} Ann went to the cellar.", "Where is the ball?", "cellar")["Where is the milk?"] == "hall"
    )


def test_nothing_is_asked_about_an_unknown_place():
    story = (
        "Ann took the milk. Bob grabbed the ball. Ann dropped the milk. Ann went to the hall. Bob went to the attic."
    )
    assert answers(2, story, "Where is the ball?", "attic") == {"Where is the ball?": "attic"}


def test_the_last_gift_counts():
    story = "Ann gave Bob the milk. Bob gave Eve the milk. Bob gave the ball to Eve. Bob went to the hall."
    assert answers(5, story, "What did Bob give to Eve last?", "ball") == {
        "What did Bob give to Eve last?": "ball",
        "What did Ann give to Bob last?": "milk",
        "Who did Ann give the milk to last?": "Bob",
        "Who did Bob give the milk to last?": "Eve",
        "Who did Bob give the ball to last?": "Eve",
        "Who received the milk last?": "Eve",
        "Who received the ball last?": "Eve",
    }


def test_rows_with_the_same_facts_are_merged_with_all_their_questions():
    story = "Ann went to the hall. Bob went to the attic."
    rows = [
        {"context": story, "query": f"Where is {who}?", "target": where}
        for who, where in (("Bob", "attic"), ("Ann", "hall"))
    ]
    assert with_every_question(rows, 1) == [
        {"context": story, "queries": ["Where is Bob?", "Where is Ann?"], "targets": ["attic", "hall"]}
    ]


def test_data_of_another_kind_are_refused():
    row = {"context": "Ann went to the hall.", "query": "Where is Ann?", "target": "attic"}
    with pytest.raises(ValueError, match="the answer to 'Where is Ann\\?' is 'hall', not 'attic'"):
        with_every_question([row], 1)
    with pytest.raises(ValueError, match="the answer to 'Why\\?' is 'nothing'"):
        with_every_question([row | {"query": "Why?"}], 1)
    with pytest.raises(ValueError, match=r"bAbI tasks \(1, 2, 5\), got 4"):
        with_every_question([row], 4)
    with pytest.raises(ValueError, match=r"bAbI tasks \(1, 2, 5\), got 4"):
        Babi(source="data", number=4, every_question=True)


def test_every_question_is_asked_in_training_only(tmp_path):
    story = "Ann went to the hall. Bob went to the attic."
    line = f'{{"context": "{story}", "query": "Where is Bob?", "target": "attic"}}\n'
    for split in ("train", "test"):
        (tmp_path / f"qa1_{split}.jsonl").write_text(2 * line)
    every, own = (Babi(source=str(tmp_path), number=1, every_question=every) for every in (True, False))
    assert [row["queries"] for row in every.training_rows()] == [["Where is Bob?", "Where is Ann?"]]
    assert [row["queries"] for row in own.training_rows()] == [["Where is Bob?", "Where is Bob?"]]
    assert [row["query"] for row in every.rows("test")] == ["Where is Bob?"] * 2
