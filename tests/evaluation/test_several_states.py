"""A question asked of several states: side by side, or of the one that most likely holds an answer."""

import pytest
from peft import get_peft_model
from small_runs import write_folder
from tiny import tiny, tiny_tokenizer

from evaluation.config import RunConfig
from evaluation.data import distractors, questions
from evaluation.run import Answerer
from gradmem_adapter import GradMemConfig


@pytest.fixture
def answerer(tmp_path):
    folder = write_folder(tmp_path)
    task = {"name": "passages", "source": str(folder / "short"), "alone": True}
    config = RunConfig.of({"backbone": "none", "tasks": [task, task | {"alone": False}]})
    memory = GradMemConfig(num_memory_tokens=3, write_lr=0.3, refusal="no idea")
    return Answerer(get_peft_model(tiny(), memory).eval(), tiny_tokenizer(), config, steps=1)


def test_the_state_with_the_most_support_is_asked(answerer):
    task, side_by_side = answerer.config.tasks
    contexts, queries, index, _ = questions(task.rows("test"))
    reads = distractors(index, len(contexts), 3, 0)
    pipeline, states = answerer.pipeline, answerer.states(contexts)
    each = [pipeline.support(query, memory=states[read]) for query, read in zip(queries, reads, strict=True)]
    best = [read[max(range(3), key=row.__getitem__)] for read, row in zip(reads, each, strict=True)]
    assert answerer.surest(states, queries, reads) == [[i] for i in best]
    assert len({read.index(i) for read, i in zip(reads, best, strict=True)}) > 1
    found = task.measure(answerer, "test", states=3)
    expected = answerer.answer(contexts, queries, [[i] for i in best], max_new_tokens=task.max_new_tokens)
    assert [line["answer"] for line in found.answers] == expected
    assert task.settings == {"alone": True} != side_by_side.settings


def test_with_one_state_both_ways_are_the_same(answerer):
    alone, side_by_side = (task.measure(answerer, "test") for task in answerer.config.tasks)
    assert alone.answers == side_by_side.answers
