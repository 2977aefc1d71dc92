"""Questions that a context does not answer: from anywhere, and from the passages around it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.tasks import Passages
from evaluation.unanswerable import NEAR, REFUSAL, occurs, with_unanswerable, without_answers
from gradmem_adapter.training.metrics import score_answer


def passages(count):
    """Passages with two questions each, numbered like their passage."""
    return [
        {"context": f"c{i}", "queries": [f"q{i}", f"r{i}"], "targets": ["a", "b"], "answers": [["a"], ["b", "c"]]}
        for i in range(count)
    ]


def test_questions_of_other_passages_have_the_refusal_as_target():
    made = with_unanswerable(passages(200), 0.25)
    assert with_unanswerable(passages(200), 0.0) == passages(200)
    for before, after in zip(passages(200), made, strict=True):
        for name in ("queries", "targets", "answers"):
            assert after[name][:2] == before[name]
        assert not {query[1:] for query in after["queries"][2:]} & {before["context"][1:]}
        assert set(after["targets"][2:]) <= {REFUSAL}
        assert after["answers"][2:] == [[REFUSAL]] * (len(after["queries"]) - 2)
    asked = [target for row in made for target in row["targets"]]
    assert asked.count(REFUSAL) / len(asked) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("near", [0.5, 1.0])
def test_a_share_of_the_questions_comes_from_nearby_passages(near):
    made = with_unanswerable(passages(800), 0.4, near)
    assert made == with_unanswerable(passages(800), 0.4, near)
    far = [abs(int(query[1:]) - i) for i, row in enumerate(made) for query in row["queries"][2:]]
    assert min(far) == 1
    assert sum(distance <= NEAR for distance in far) / len(far) == pytest.approx(near, abs=0.08)


WORDS = st.lists(st.sampled_from(["Red", "a cat", "the", "1867-71", "1867", "U.S.", "us", "«NAÏVE»", "naïve", "dog,"]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), min_size=2, max_size=12), st.integers(0, 12))
def test_nearby_questions_are_not_answered_by_the_context(texts, shift):
    """If none is left nearby, questions come from anywhere."""
    rows = [{"context": " ".join(c), "queries": [f"{i} {j}" for j in range(len(a))] or [f"{i}"], "answers": a or [[]]}
            for i, (c, a) in enumerate(texts)]  # fmt: skip
    rows = [row | {"targets": row["queries"], "answers": [[" ".join(a), "unheard of"] for a in row["answers"]]}
            for row in [*rows, *passages(shift)]]  # fmt: skip
    accepted = {query: texts for row in rows for query, texts in zip(row["queries"], row["answers"], strict=True)}
    for i, (row, made) in enumerate(zip(rows, with_unanswerable(rows, 0.5, 1.0), strict=True)):
        around = [query for j, other in enumerate(rows) if 0 < abs(i - j) <= NEAR for query in other["queries"]]
        right = {query for query in around if not any(occurs(text, row["context"]) for text in accepted[query])}
        count = len(row["queries"])
        asked = made["queries"][count:]
        assert made["queries"][:count] == row["queries"]
        assert len(asked) == count
        assert not set(asked) & set(row["queries"])
        assert set(asked[: len(right)]) <= right
        assert len(set(asked[: len(right)])) == min(count, len(right))


@settings(deadline=None, max_examples=40)
@given(WORDS, WORDS, WORDS)
def test_occurs_finds_every_answer_that_a_score_would_find(before, answer, after):
    context = [*before, *answer, *after]
    assert occurs(" ".join(answer), " ".join(context).swapcase())
    assert occurs(" ".join(reversed(answer)), " - ".join(context))
    if score_answer(" ".join(after), [" ".join(before)])["exact_match"]:
        assert occurs(" ".join(after), " ".join(before))


@pytest.mark.parametrize(
    ("answer", "context", "there"),
    [("1867", "from 1867–71", True), ("well-known", "a well known man", True), ("US", "in the U.S.", True),  # noqa: RUF001
     ("a red cat", "the cat is Red", True), ("two", "twofold", False), ("red cat", "a red dog", False)],
)  # fmt: skip
def test_occurs_compares_words(answer, context, there):
    assert occurs(answer, context) == there


def test_nearby_questions_are_an_option_of_passages(monkeypatch):
    monkeypatch.setattr("evaluation.tasks.base.qa_rows", lambda *_, **__: passages(800))
    task = Passages(source="data/squad", unanswerable=0.4, nearby=True)
    assert task.settings == {"unanswerable": 0.4, "nearby": True}
    for rows, near in ((task.rows("test"), 1.0), (task.training_rows(), 0.5)):
        assert rows == with_unanswerable(passages(800), 0.4, near)
    with pytest.raises(ValueError, match="set unanswerable to their share"):
        Passages(source="data/squad", nearby=True)


@pytest.mark.parametrize("nearby", [False, True])
def test_a_single_passage_is_refused(monkeypatch, nearby):
    """The error was once about random numbers below one."""
    monkeypatch.setattr("evaluation.tasks.base.qa_rows", lambda *_, **__: passages(3))
    task = Passages(source="data/squad", unanswerable=0.3, nearby=nearby, joined=200)
    assert len(task.rows("test")) == 3
    with pytest.raises(ValueError, match=r"the split 'train' of 'data/squad' makes only one context\. .*join fewer"):
        task.training_rows()  # all passages are one context
    monkeypatch.setattr("evaluation.tasks.base.qa_rows", lambda *_, **__: passages(1))
    with pytest.raises(ValueError, match=r"the split 'valid' .* Add passages"):
        task.rows("valid")
    assert Passages(source="data/squad").rows("valid") == passages(1)


def test_questions_that_only_a_removed_sentence_answered_are_refused(monkeypatch):
    sentences = ["Ann lives in Oslo.", "Ben is a baker from Oslo.", "They met in 1999."]
    asked = {"Where does Ann live?": ["Oslo"], "What is Ben?": ["a baker", "baker"], "When did they meet?": ["1999"]}
    row = {
        "context": " ".join(sentences), "queries": list(asked), "targets": [answers[0] for answers in asked.values()],
        "answers": list(asked.values()),
    }  # fmt: skip
    rows = [row | {"context": f"{row['context']} {i}"} for i in range(200)]
    assert without_answers(rows, 0) == rows
    seen = set()
    for before, after in zip(rows, without_answers(rows, 1), strict=True):
        (gone,) = (sentence for sentence in sentences if sentence not in after["context"])
        kept = dict(zip(after["queries"], after["answers"], strict=True))
        assert after["targets"] == [accepted[0] for accepted in kept.values()]
        assert len(before["context"]) - len(after["context"]) in (len(gone), len(gone) + 1)
        for query, accepted in asked.items():
            where = [sentence for sentence in sentences if accepted[-1] in sentence]
            wanted = accepted if gone not in where else [REFUSAL] if where == [gone] else None  # the rest may answer it
            assert kept.get(query) == wanted
        seen.add(gone)
    assert seen == set(sentences)
    some = [before != after for before, after in zip(rows, without_answers(rows, 0.3), strict=True)]
    assert sum(some) == pytest.approx(60, abs=20)
    monkeypatch.setattr("evaluation.tasks.base.qa_rows", lambda *_, **__: rows)
    task = Passages(source="data/squad", removed=0.3)
    assert task.settings == {"removed": 0.3}
    assert task.rows("test") == task.training_rows() == without_answers(rows, 0.3)


def test_texts_without_a_removable_sentence_stay():
    row = {"context": "Ann lives in Oslo.", "queries": ["Where?"], "targets": ["Oslo"], "answers": [["Oslo"]]}
    other = row | {"context": "Ann. Ben.", "answers": [["nowhere"]], "targets": ["nowhere"]}
    assert without_answers([row, other], 1) == [row, other]
