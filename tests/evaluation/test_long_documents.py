"""Questions about long articles: how they are split, and which pieces a question is asked of."""

import gzip
import json

import pytest
import torch
from peft import get_peft_model
from small_runs import write_articles
from tiny import tiny, tiny_tokenizer

from evaluation.config import RunConfig
from evaluation.run import Answerer
from gradmem_adapter import GradMemConfig


@pytest.fixture
def source(tmp_path):
    write_articles(tmp_path)
    return tmp_path


@pytest.fixture
def measure(source):
    def run(method="gradmem", states=1, **options):
        memory = {"num_memory_tokens": 6, "trained_length": 20, "refusal": "no idea"}
        task = {"name": "long_documents", "source": str(source)}
        config = RunConfig.of({"backbone": "none", "method": {"name": method}, "tasks": [task | options]})
        backbone = tiny(max_position_embeddings=300)
        model = (
            get_peft_model(backbone, GradMemConfig(**memory))
            if method == "gradmem"
            else config.method.build(backbone, {})
        )
        answerer = Answerer(model.eval(), tiny_tokenizer(), config, steps=1)
        return config.tasks[0].measure(answerer, "test", states=states)

    return run


def test_the_right_paragraph_can_be_given(measure):
    found = measure(pieces="paragraphs", chosen="right")
    assert found.values["found"].tolist() == [1.0] * 8
    assert found.facts["context_tokens"] == 10
    assert {"f1", "exact_match", "rouge_l", "found"} == set(found.values)


@pytest.mark.parametrize("alone", [False, True])
def test_paragraphs_are_found_by_words(measure, alone):
    one, all_four = (measure(pieces="paragraphs", states=k, alone=alone).values["found"] for k in (1, 4))
    assert one.mean() > 0.7
    assert all_four.tolist() == [1.0] * 8


def test_search_scores_count_if_each_piece_is_asked_alone(measure, monkeypatch):
    seen, own = [], Answerer.surest

    def surest(self, memory, queries, reads, search_scores):
        seen.extend(zip(reads, search_scores, strict=True))
        return own(self, memory, queries, reads, search_scores)

    monkeypatch.setattr(Answerer, "surest", surest)
    measure(pieces="paragraphs", states=2, alone=True)
    assert len(seen) == 8
    assert all(len(read) == 2 and best > 0 and best >= other >= 0 for read, (best, other) in seen)


def test_segments_have_the_adapters_length_by_default(measure):
    assert 8 < measure(states=2).facts["context_tokens"] <= 12
    assert measure(segment_tokens=7).facts["context_tokens"] <= 7
    with pytest.raises(ValueError, match="set segment_tokens"):
        measure(method="full_context")


def test_whole_articles_are_cut_to_what_the_model_takes(measure):
    assert measure(method="full_context", pieces="whole").facts["context_tokens"] == 40
    assert 22 <= measure(method="full_context", pieces="segments", segment_tokens=44).facts["context_tokens"] <= 44


def test_the_number_of_questions_per_article_can_be_limited(measure):
    some = measure(questions=2)
    assert len(some.answers) == 4
    assert torch.equal(measure(questions=2).values["f1"], some.values["f1"])
    assert len(measure(questions=9).answers) == 8


def test_articles_without_questions_are_skipped(measure, source):
    file = source / "squad_articles_test.jsonl.gz"
    articles = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    articles[0]["questions"] = []
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, articles)).encode()))
    assert len(measure().answers) == 4
    file.write_bytes(gzip.compress(json.dumps(articles[0]).encode()))
    with pytest.raises(ValueError, match=r"No article of .*test\.jsonl\.gz has a question"):
        measure()


def test_an_article_can_be_written_into_one_state(measure):
    found = measure(pieces="sequential")
    assert found.facts["context_tokens"] == 40
    assert len(found.answers) == 8


@pytest.mark.parametrize("options", [{"chosen": "right"}, {"pieces": "whole"}, {"pieces": "sequential"}])
def test_settings_with_a_single_piece_refuse_several_states(measure, options):
    with pytest.raises(ValueError, match="use 1 state, not 2"):
        measure(states=2, **options)


def test_other_methods_than_gradmem_are_refused(measure):
    with pytest.raises(TypeError, match="need the method gradmem"):
        measure(method="full_context", pieces="sequential")
    with pytest.raises(TypeError, match="need the method gradmem"):
        measure(method="full_context", segment_tokens=7, alone=True)
