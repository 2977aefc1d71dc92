"""The weights that ship for key-value retrieval, and the commands that use them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.cli import app
from gradmem_adapter.cli.options import CHECKPOINTS
from gradmem_adapter.tasks.kv_results import TASK, KVRecord
from gradmem_adapter.tasks.kv_retrieval import KVRetrieval, kv_exact_match, kv_hits
from gradmem_adapter.tasks.kv_training import evaluate_kv, load_kv
from gradmem_adapter.tasks.records import load_records

CHECKPOINT = CHECKPOINTS / "kv-retrieval"
RESULTS = Path(__file__).parent.parent / "results" / "kv_retrieval.json"


@pytest.fixture(scope="module")
def model():
    return load_kv(CHECKPOINT)[0]


@pytest.mark.parametrize(("pairs", "steps"), [(4, 1), (16, 1), (16, 5), (32, 2), (32, 30), (64, 5), (96, 5)])
def test_scores_what_the_results_say(model, pairs, steps):
    """Within three standard deviations of a measurement on fewer contexts, whose queries are not independent."""
    (recorded,) = (
        r.exact_match
        for r in load_records(RESULTS, TASK, KVRecord)
        if (r.method, r.pairs, r.write_steps) == ("gradmem", pairs, steps) and not r.one_number
    )
    contexts = 32 if steps <= 5 else 8
    measured = evaluate_kv(model, pairs, steps, contexts=contexts, seed=123)
    deviation = (max(recorded * (1 - recorded), 0.01) / contexts) ** 0.5
    assert measured == pytest.approx(recorded, abs=3 * deviation)


@pytest.mark.parametrize("steps", [6, 7, 9])
def test_steps_that_training_did_not_draw_retrieve_too(model, steps):
    """With rates of its own for each of the last steps, six steps had 83 % where five had 97."""
    assert evaluate_kv(model, 96, steps, contexts=8, seed=123) > 0.95


def test_hits_with_the_target_given_equal_greedy_generation():
    pipeline = GradMemPipeline(*load_checkpoint(CHECKPOINT))
    task = KVRetrieval(64)
    batch, rows = task.sample(8, 16, seed=0), list(task.rows(8, 16, seed=0))
    hits = kv_hits(pipeline.model(**batch.as_dict(), write_steps=2).logits, batch.labels)
    state = pipeline.write([row["context"] for row in rows], steps=2)
    answers = pipeline.generate(
        [query for row in rows for query in row["queries"]],
        memory=state,
        context_index=batch.context_index,
        max_new_tokens=4,
        do_sample=False,
    )
    targets = [target for row in rows for target in row["targets"]]
    expected = [kv_exact_match(answer, target) for answer, target in zip(answers, targets, strict=True)]
    assert hits.tolist() == expected
    assert 0 < sum(expected) < len(expected), "there is nothing to tell apart"


def test_compiled_layers_retrieve_the_same():
    pipeline = GradMemPipeline(*load_checkpoint(CHECKPOINT))
    rows = list(KVRetrieval(64).rows(4, 32, seed=0))
    contexts = [row["context"] for row in rows]
    plain, fast = (pipeline.write(contexts, steps=3, compile=compile) for compile in (False, True))
    assert ((fast.vectors - plain.vectors).norm() / plain.vectors.norm()).item() < 1e-5
    queries, index = [query for row in rows for query in row["queries"]], [i for i in range(4) for _ in range(32)]
    answers = [
        pipeline.generate(queries, memory=state, context_index=index, max_new_tokens=4, do_sample=False)
        for state in (plain, fast)
    ]
    assert answers[0] == answers[1]


def test_eval_and_plot_commands(tmp_path):
    results = tmp_path / "results.json"
    command = [
        "eval",
        str(CHECKPOINT),
        "--pairs",
        "4,8",
        "--steps",
        "1,2",
        "--contexts",
        "4",
        "--results",
        str(results),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "GradMem, 2 steps" in result.output
    assert len(load_records(results, TASK, KVRecord)) == 4
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(load_records(results, TASK, KVRecord)) == 4, (
        "a measurement that is made again takes the place of the old one"
    )
    result = CliRunner().invoke(app, ["plot", str(results), "--output", str(tmp_path / "plots")])
    assert result.exit_code == 0, result.output
    assert "paper: GradMem, 5 steps" in " ".join(result.output.split())
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
        "kv_retrieval.png",
        "kv_retrieval_steps.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "4,x"], "--pairs takes integers"),
        (["--pairs", "0"], "max_pairs must be an integer from 1"),
        (["--steps", "-1"], "cannot be negative"),
        (["--split", "valid"], "--split is for models of questions about texts alone"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--pairs", "200"], "tokens, and at most"),
    ],
)
def test_eval_refuses_what_it_cannot_do(arguments, message):
    result = CliRunner().invoke(app, ["eval", str(CHECKPOINT), "--contexts", "1", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_eval_of_something_else_says_so(tmp_path):
    result = CliRunner().invoke(app, ["eval", str(tmp_path)])
    assert result.exit_code == 2
    assert "There is no model trained by a recipe in" in " ".join(result.stderr.split())


def test_results_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text('{"records": [{"x": 1}]}', encoding="utf-8")
    result = CliRunner().invoke(app, ["plot", str(file)])
    assert result.exit_code == 2
    assert "no file of results" in " ".join(result.stderr.split())
