"""Empty inputs give empty results, or an error of our own if at least one item is needed."""

import pytest
import torch
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStore
from gradmem_adapter.utils.temporary import PREFIX

CONTEXTS = [tiny_text(9, 1), tiny_text(5, 2)]
NO_QUERY = "There is no query to read"
EMPTY, NO_ROWS = torch.empty(0, 0, dtype=torch.long), torch.empty(0, 5, dtype=torch.long)


@pytest.fixture(scope="module", params=["w1 w2", None], ids=["refuses", "answers all"])
def pipeline(request):
    return tiny_pipeline(refusal=request.param)


@pytest.fixture(scope="module")
def states(pipeline):
    return pipeline.write(CONTEXTS)


@pytest.mark.parametrize("count", [1, 2])
def test_no_prompts_give_no_answers(pipeline, states, count):
    memory = states[:count]
    assert pipeline.generate([]) == pipeline.generate([], memory=memory, return_scores=True) == []
    if pipeline.model.active_peft_config.refusal:
        assert pipeline.support([], memory=memory) == []


def test_an_empty_batch_is_refused(pipeline, states):
    model, one = pipeline.model, states[0]
    for call in (
        lambda: pipeline.encode_prompts([]),
        lambda: pipeline.pad_prompts([]),
        lambda: pipeline.generate_ids(EMPTY, EMPTY),
        lambda: pipeline.generate_ids(EMPTY, EMPTY, memory=one),
        lambda: model.generate(NO_ROWS, memory=states),
        lambda: model(NO_ROWS, memory=one, labels=NO_ROWS),
        lambda: model.query_prefix(one, 0),
        lambda: model.log_likelihood([], [], one),
    ):
        with pytest.raises(ValueError, match=NO_QUERY):
            call()


def test_methods_for_one_prompt_refuse_lists(pipeline, states):
    """They would otherwise return the best state of any prompt in the list."""
    asked = [(pipeline.surest_answer, {"max_new_tokens": 2})]
    if pipeline.refuses:
        asked.append((pipeline.select, {}))
    for ask, options in asked:
        with pytest.raises(ValueError, match="empty conversation"):
            ask([], memory=states)
        with pytest.raises(ValueError, match=r"A chat message must be a mapping .* pass the text itself, not a list"):
            ask(["w1", "w2"], memory=states)
        with pytest.raises(ValueError, match="2 states and 0 search scores"):
            ask("w1", memory=states, search_scores=[], **options)


def test_a_prompt_without_tokens_needs_a_memory(pipeline, states):
    options = {"max_new_tokens": 2}
    alone = pipeline.generate("", memory=states[0], **options)
    assert pipeline.generate(["w1", ""], memory=states[0], **options)[1:] == alone
    for prompts, which in ("", "0"), (["", ""], "0, 1"), (["w1", ""], "1"):
        with pytest.raises(ValueError, match=f"Prompt {which} has no tokens, and without memory"):
            pipeline.generate(prompts, **options)


def test_a_query_that_reads_no_state_is_refused(pipeline, states):
    with pytest.raises(ValueError, match="context_index must have one integer, or one row of integers, for each query"):
        pipeline.generate(["w1"], memory=states, context_index=torch.empty(1, 0, dtype=torch.long))


def test_an_empty_query_has_a_likelihood(pipeline, states):
    model = pipeline.model
    for state in states:
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6]]), memory=state, labels=torch.tensor([[5, -100]])).loss
        torch.testing.assert_close(model.log_likelihood([[]], [[5]], state), -logits[None])
        torch.testing.assert_close(model.log_likelihood([[], []], [[5], [6]], state)[:1], -logits[None])


def test_a_missing_store_acts_as_empty_and_is_not_created(pipeline, tmp_path):
    store, key = MemoryStore(tmp_path / "store"), "0" * 32
    assert store.add(pipeline, []) == store.gc([key]) == store.gc() == store.choose(pipeline, "w1") == []
    store.delete(key)
    assert store.forget("a.txt") == 0
    assert not store.path.exists()
    (store.path / f"{PREFIX}1-x").mkdir(parents=True)  # left by a process that was killed before there was an index
    store.gc()
    assert not list(store.path.iterdir())


def test_empty_lists_of_keys(pipeline, tmp_path):
    store = MemoryStore(tmp_path / "store")
    keys = store.add(pipeline, CONTEXTS, sources="a.txt")
    store.delete([])
    assert store.forget("a.txt", []) == 0
    with pytest.raises(ValueError, match="Got no keys"):
        store.get([])
    store.delete(keys[0])
    assert list(store) == keys[1:]
