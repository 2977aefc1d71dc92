"""The data of key-value retrieval, its tokenizer and its metric."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmem_adapter.tasks.kv_retrieval import KVRetrieval, kv_exact_match, kv_tokenizer
from gradmem_adapter.training import GradMemCollator


def pairs_of(context, task):
    """The pairs of a context's text, read by the format alone."""
    assert context.endswith("|")
    size = 3 + task.key_length + task.value_length
    segments = [context[i : i + size] for i in range(0, len(context) - 1, size + task.noise)]
    assert all(s[0] == s[-1] == "!" and s[1 + task.key_length] == ":" for s in segments)
    return [(s[1 : 1 + task.key_length], s[2 + task.key_length : -1]) for s in segments]


@settings(max_examples=40, deadline=None)
@given(
    fewest=st.integers(1, 6),
    more=st.integers(0, 6),
    key_length=st.integers(1, 4),
    value_length=st.integers(1, 3),
    noise=st.integers(0, 3),
    queries=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_answers_are_in_the_context(fewest, more, key_length, value_length, noise, queries, seed):
    task = KVRetrieval(fewest + more, fewest, key_length, value_length, noise)
    rows = list(task.rows(3, queries, seed))
    assert len(rows) == 3
    for row in rows:
        pairs = pairs_of(row["context"], task)
        assert fewest <= len(pairs) <= fewest + more
        assert len(dict(pairs)) == len(pairs), "a key twice"
        assert len(row["queries"]) == len(row["targets"]) == queries
        for query, target in zip(row["queries"], row["targets"], strict=True):
            assert query.startswith("?!")
            assert query.endswith(":")
            assert target == dict(pairs)[query[2:-1]] + "!|"
        if queries <= fewest:
            assert len(set(row["queries"])) == queries
    assert list(task.rows(3, queries, seed)) == rows


def test_a_batch_is_what_the_collator_makes_of_its_rows():
    task = KVRetrieval(5, 2)
    batch = task.sample(4, 2, seed=3)
    collated = GradMemCollator(kv_tokenizer(), add_eos=False)(list(task.rows(4, 2, seed=3)))
    for name, value in batch.as_dict().items():
        length = collated[name].shape[-1]
        assert torch.equal(value[..., :length], collated[name]), name
        assert not value[..., length:].any(), name


def test_the_number_of_pairs_varies_over_its_whole_range():
    lengths = KVRetrieval(5, 2).sample(200, 1, seed=0).context_attention_mask.sum(1)
    assert sorted(set(lengths.tolist())) == [2 * 7 + 1, 3 * 7 + 1, 4 * 7 + 1, 5 * 7 + 1]


def test_tokenizer_gives_one_token_per_character_and_back():
    tokenizer = kv_tokenizer()
    text = "!aZ:09!?|"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "|"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_pairs": 0}, "max_pairs must be an integer from 1"),
        ({"max_pairs": 3, "min_pairs": 4}, "min_pairs must lie in 1 to max_pairs"),
        ({"max_pairs": 63, "key_length": 1}, "63 unique keys of 1 characters do not exist"),
        ({"max_pairs": 3, "noise": -1}, "noise"),
        ({"max_pairs": 3, "value_length": 0}, "value_length"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVRetrieval(**arguments)


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("ab!|", True), ("ab!xy", True), ("ac!|", False), ("ab", True), ("", False), ("abc!", False)],
)
def test_exact_match_reads_the_value_up_to_its_edge(prediction, hit):
    assert kv_exact_match(prediction, "ab!|") is hit
