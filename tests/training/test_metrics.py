"""Scores of answers: exact match and F1 as in SQuAD."""

import pytest

from gradmem_adapter.training import score_answer


@pytest.mark.parametrize(
    ("answer", "references", "exact_match", "f1"),
    [
        ("The bees.", ["wasps", "bees"], 1, 1),
        ("bees and wasps", ["wasps", "bees"], 0, 0.5),
        ("  The  Town-hall, a ROOF! ", ["townhall roof"], 1, 1),
        ("Ada keeps bees", ["bees"], 0, 0.5),  # precision 1/3, recall 1
        ("bees bees", ["the bees", "nine wasps"], 0, 2 / 3),
        ("wasps", ["bees"], 0, 0),
        ("", ["bees"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
    ],
)
def test_score_answer(answer, references, exact_match, f1):
    assert score_answer(answer, references) == pytest.approx({"exact_match": exact_match, "f1": f1})
