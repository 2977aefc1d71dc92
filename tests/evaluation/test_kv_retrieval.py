"""The data of key-value retrieval, its tokenizer, its curriculum and its metric."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.key_values import as_rows, pairs_tokenizer, sample_pairs
from evaluation.tasks import KVRetrieval
from evaluation.tasks.kv_retrieval import Mix, Stage
from gradmem_adapter.training import GradMemCollator

CPU = torch.device("cpu")


def sampled(*numbers, seed=0):
    return sample_pairs(*numbers, generator=torch.Generator().manual_seed(seed))


def pairs_of(context):
    """The pairs of a context's text, parsed only by its format."""
    assert context.endswith("|")
    segments = [context[i : i + 7] for i in range(0, len(context) - 1, 7)]
    assert all(s[0] == s[-1] == "!" and s[3] == ":" for s in segments)
    return [(s[1:3], s[4:6]) for s in segments]


@settings(max_examples=40, deadline=None)
@given(fewest=st.integers(1, 6), more=st.integers(0, 6), queries=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_answers_are_in_the_context(fewest, more, queries, seed):
    rows = as_rows(sampled(3, queries, fewest + more, fewest, seed=seed))
    assert len(rows) == 3
    for row in rows:
        pairs = pairs_of(row["context"])
        assert fewest <= len(pairs) <= fewest + more
        assert len(dict(pairs)) == len(pairs), "a key twice"
        assert len(row["queries"]) == len(row["targets"]) == queries
        for query, target in zip(row["queries"], row["targets"], strict=True):
            assert query.startswith("?!")
            assert query.endswith(":")
            assert target == dict(pairs)[query[2:-1]] + "!|"
        if queries <= fewest:
            assert len(set(row["queries"])) == queries


def test_a_batch_equals_what_the_collator_makes_of_its_rows():
    batch = sampled(4, 2, 5, 2, seed=3)
    rows = as_rows(batch)
    for row in rows:  # the collator ends a target itself
        row["targets"] = [target.removesuffix("|") for target in row["targets"]]
    collated = GradMemCollator(pairs_tokenizer())(rows)
    for name, value in batch.items():
        length = collated[name].shape[-1]
        assert torch.equal(value[..., :length], collated[name]), name
        assert not value[..., length:].any(), name


def test_the_number_of_pairs_varies_over_its_whole_range():
    lengths = sampled(200, 1, 5, 2)["context_attention_mask"].sum(1)
    assert sorted(set(lengths.tolist())) == [2 * 7 + 1, 3 * 7 + 1, 4 * 7 + 1, 5 * 7 + 1]


def test_the_tokenizer_gives_one_token_per_character_and_back():
    tokenizer = pairs_tokenizer()
    text = "!aZ:09!?|"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "|"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVRetrieval(pairs=0), "pairs"),
        (lambda: KVRetrieval(pairs=4000), "number of unique keys, got 4000"),
        (lambda: Mix(max_pairs=3, min_pairs=4, contexts=1, queries=1), "min_pairs must be from 1 to max_pairs"),
        (lambda: KVRetrieval().batches(0, ()), "at least one stage"),
    ],
)
def test_impossible_tasks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("answer", "hit"),
    [("ab!|", True), ("ab!xy", True), ("ac!|", False), ("ab", True), ("", False), ("abc!", False)],
)
def test_exact_match_compares_the_two_characters_of_the_value(answer, hit):
    assert KVRetrieval().score(answer, ["ab!|"]) == {"exact_match": hit}


STAGES = (
    Stage(4, (Mix(2, 8, 2, write_steps=(1, 2)),), lr_factor=1.5),
    Stage(60, (Mix(4, 4, 2, min_pairs=2, write_steps=(2,), share=3), Mix(2, 4, 2))),
)


def test_stages_follow_each_other_and_the_step_decides_the_mix():
    task = KVRetrieval(stages=STAGES)
    batches = task.batches(0, ())
    assert (len(batches), task.steps) == (64, 64)
    assert {batches.stage_at(step) for step in range(64)} == set(STAGES)
    assert [batches.lr_factor(step) for step in (0, 3, 4, 63)] == [1.5, 1.5, 1, 1]
    later = [batches.kind_at(step)[0].max_pairs for step in range(4, 64)]
    assert 0.6 < later.count(4) / len(later) < 0.9
    batch, again = (task.batches(0, ()).batch(9, CPU) for _ in range(2))
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(again[name])) for name, value in batch.items())
    assert not torch.equal(batch["context_input_ids"][0], task.batches(1, ()).batch(9, CPU)["context_input_ids"][0])


def test_write_steps_of_the_run_override_those_of_its_stages():
    task = KVRetrieval(stages=STAGES)
    assert {task.batches(0, ()).batch(step, CPU)["write_steps"] for step in range(4)} == {1, 2}
    assert {task.batches(0, (3,)).batch(step, CPU)["write_steps"] for step in range(40)} == {3}
    assert set(task.write_steps) == {1, 2}
