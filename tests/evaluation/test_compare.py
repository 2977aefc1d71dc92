"""Answers of two models to the same questions, compared in pairs."""

import json
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from evaluation.cli import app
from evaluation.compare import compare, differences, load_answers
from evaluation.results import RESULTS

KEPT = RESULTS / "answers"


def answer(f1, query="Who?", **fields):
    scores = {"exact_match": float(f1 == 1), "f1": f1, "rouge_l": f1}
    where = {"dataset": "tales", "split": "test", "states": 1, "write_steps": 1}
    return where | {"query": query, "answer": "she", "accepted": ["she"]} | scores | fields


def table(answers):
    return pd.DataFrame(answers)


def file(path, answers):
    path.write_text("".join(json.dumps(a) + "\n" for a in answers), encoding="utf-8")
    return path


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
def test_a_difference_is_the_mean_of_differences(scores):
    first, second = (table([answer(pair[i]) for pair in scores]) for i in (0, 1))
    found, turned = differences(first, second).loc["f1"], differences(second, first).loc["f1"]
    apart = [a - b for a, b in scores]
    mean = sum(apart) / len(apart)
    variance = sum((d - mean) ** 2 for d in apart) / (len(apart) - 1)
    assert found["mean"] == pytest.approx(mean, abs=1e-12)
    assert found.error == pytest.approx(math.sqrt(variance / len(apart)), abs=1e-12)
    assert turned["mean"] == pytest.approx(-found["mean"], abs=1e-12)


def test_what_both_models_share_does_not_count_as_error():
    hard, easy = [0.0, 0.5] * 50, [0.1, 0.6] * 50
    found = differences(table([answer(f1) for f1 in easy]), table([answer(f1) for f1 in hard])).loc["f1"]
    assert found["mean"] == pytest.approx(0.1)
    assert found.error < 1e-9
    assert differences(table([answer(1.0)]), table([answer(1.0)])).loc["f1", "errors"] == 0
    assert differences(table([answer(0.0)]), table([answer(1.0)])).loc["f1", "errors"] == -math.inf


def test_the_command_compares_matching_settings(tmp_path):
    one = [answer(f1, query=str(i), write_steps=k) for k in (0, 1) for i, f1 in enumerate((0.5, 0.7, 0.9 + 0.1 * k))]
    other = [answer(f1, query=str(i), write_steps=1) for i, f1 in enumerate((0.1, 0.5, 0.9))]
    extra = [answer(1.0, dataset="pairs")]
    first, second = file(tmp_path / "a.jsonl", [*one, *extra]), file(tmp_path / "b.jsonl", other)
    run = CliRunner().invoke(app, ["compare", str(first), str(second)])
    assert run.exit_code == 0, run.output
    rows = [[cell.strip() for cell in line.split("|")] for line in run.output.splitlines() if "tales" in line]
    assert [row[4] for row in rows] == ["0, 1", "1, 1"]
    assert "+20.0 ± 11.5" in run.output
    assert "+23.3 ± 8.8" in run.output
    assert "pairs" not in run.output


def test_an_answer_may_contain_unicode_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(answer(0.5, query="One\u2028or\x85two?"), ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_answers(path)["query"].tolist() == ["One\u2028or\x85two?"]


def test_answers_that_cannot_be_compared_are_refused(tmp_path):
    first = file(tmp_path / "a.jsonl", [answer(0.5), answer(0.7)])
    for content, message in (
        ([answer(0.5)], "different questions: 2 and 1"),
        ([answer(0.5), answer(0.5, query="Where?")], "different questions"),
        ([answer(0.5, split="valid")], "have no data set, split and number of states"),
        ([{"f1": 1}], "is not a file of answers: an answer has no dataset"),
    ):
        second = file(tmp_path / "b.jsonl", content)
        run = CliRunner().invoke(app, ["compare", str(first), str(second)])
        assert run.exit_code == 2
        assert message in " ".join(run.output.split())
        with pytest.raises(ValueError, match=message.split(":")[0]):
            compare(first, second)
    with pytest.raises(ValueError, match="is not a file of answers"):
        load_answers(file(tmp_path / "c.jsonl", ["text"]))


def test_the_readmes_claim_about_fairy_tales_holds():
    """The shipped adapter is more than two standard errors above each baseline, by the answers that are kept."""
    gradmem = load_answers(KEPT / "fairytaleqa_gradmem.jsonl").query("write_steps == 1 and states == 1")
    for name, least in (("mean_pooling", 2), ("forward_memory", 10)):
        baseline = load_answers(KEPT / f"fairytaleqa_{name}.jsonl")
        assert differences(gradmem, baseline).loc["f1", "errors"] > least
