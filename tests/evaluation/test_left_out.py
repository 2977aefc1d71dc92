"""Whether support drops once the paragraph with the answer is left out of a long text."""

import pytest
from peft import get_peft_model
from small_runs import write_articles
from tiny import tiny, tiny_tokenizer

from evaluation.config import RunConfig
from evaluation.run import Answerer
from gradmem_adapter import GradMemConfig, GradMemPipeline
from gradmem_adapter.support import Selected


@pytest.fixture
def measure(tmp_path):
    write_articles(tmp_path)

    def run(refusal="no idea", method="gradmem", states=2, **options):
        task = {"name": "left_out", "source": str(tmp_path), "segment_tokens": 20} | options
        config = RunConfig.of({"backbone": "none", "method": {"name": method}, "tasks": [task]})
        backbone = tiny(max_position_embeddings=300)
        adapter = GradMemConfig(num_memory_tokens=6, refusal=refusal)
        model = get_peft_model(backbone, adapter) if method == "gradmem" else config.method.build(backbone, {})
        answerer = Answerer(model.eval(), tiny_tokenizer(), config, steps=1)
        return config.tasks[0].measure(answerer, "test", states=states)

    return run


@pytest.fixture
def seen(monkeypatch):
    """The search scores of each selection; the support is the best of them, as a share of 20."""
    calls = []

    def select(self, prompt, *, memory, search_scores, support):
        assert support
        assert len(memory) == len(search_scores)
        calls.append(search_scores)
        return Selected(memory, [0], max(search_scores) / 20)

    monkeypatch.setattr(GradMemPipeline, "select", select)
    return calls


def test_a_question_is_asked_with_and_without_the_segments_of_its_paragraph(measure, seen):
    found = measure()
    assert len(seen) == 2 * 8
    for line, whole, left_out in zip(found.answers, seen[::2], seen[1::2], strict=True):
        assert max(whole) > max(left_out)  # the segment with the words of the question is gone
        assert line["whole"] == max(whole) / 20
        assert line["left_out"] == max(left_out) / 20
    assert found.values["auc"].mean() > 0.9


def test_shares_below_thresholds_are_reported(measure, seen):
    found = measure()
    for of in ("whole", "left_out"):
        expected = [float(line[of] < 0.5) for line in found.answers]
        assert found.values[f"{of}_below_0.5"].tolist() == expected
        assert found.values[f"{of}_below_0.97"].sum() >= sum(expected)


def test_support_comes_from_the_pipeline(measure):
    found = measure(questions=2)
    assert len(found.answers) == 4
    assert all(0 < line[of] < 1 for line in found.answers for of in ("whole", "left_out"))


def test_an_article_of_one_segment_has_no_support_left(measure):
    assert {line["left_out"] for line in measure(segment_tokens=60).answers} == {0.0}


def test_adapters_that_do_not_refuse_and_other_methods_are_refused(measure):
    with pytest.raises(ValueError, match="trained to refuse"):
        measure(refusal=None)
    with pytest.raises(TypeError, match="need the method gradmem"):
        measure(method="full_context")
