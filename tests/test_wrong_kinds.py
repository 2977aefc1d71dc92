"""Arguments of a wrong type are named where they are passed, not by an error from deep inside."""

import pytest
import torch
from tiny import tokens
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import GradMemPipeline, MemoryState, MemoryStore

NO_STATES = [None, 5, "abc", ["a"], {"a": 1}, b"ab", torch.ones(2)]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(trained_length=50, refusal="w1 w2")


@pytest.fixture(scope="module")
def state(pipeline):
    return pipeline.write("w1 w2 w3")


@pytest.fixture
def store(pipeline, tmp_path):
    store = MemoryStore(tmp_path / "store")
    store.add(pipeline, ["w1 w2 w3"])
    return store


def refused(name, value=None):
    kind = "" if value is None else type(value).__name__
    return pytest.raises(TypeError, match=rf"^{name} must be .*, got {kind}")


@pytest.mark.parametrize("wrong", NO_STATES, ids=repr)
def test_anything_but_a_memory_state_is_refused(pipeline, state, store, wrong):
    model, ids = pipeline.model, tokens(1, 3)
    for read in (
        lambda: pipeline.reconstruct(wrong),
        lambda: pipeline.support("w1", memory=wrong),
        *([] if isinstance(wrong, list) else [lambda: pipeline.select("w1", memory=wrong)]),
        lambda: pipeline.select("w1", memory=[state, wrong]),
        lambda: pipeline.surest_answer("w1", memory=wrong),
        lambda: pipeline.update(wrong, "w1"),
        lambda: pipeline.fidelity("w1", wrong),
        lambda: model.reconstruct(wrong),
        lambda: model.prefix_embeddings(wrong),
        lambda: model.update(wrong, ids),
        lambda: model.log_likelihood([[4]], [[5]], wrong),
    ):
        with refused("memory", wrong):
            read()
    with refused("other", wrong):
        state.equal(wrong)
    with refused("states", wrong):
        store.put(wrong, [])
    if wrong is not None:
        for read in (lambda: pipeline.generate("w1", memory=wrong), lambda: model(input_ids=ids, memory=wrong)):
            with refused("memory", wrong):
                read()


def test_the_error_for_lists_says_how_they_become_one_memory(pipeline, state, store):
    chosen = store.choose(pipeline, "w1")
    for wrong in ([state], (state, state), chosen):
        with pytest.raises(
            TypeError,
            match=rf"^memory must be .*MemoryState\.stack\(states\).*choice\.entry\.key.*got {type(wrong).__name__}",
        ):
            pipeline.generate("w1", memory=wrong)
    assert pipeline.generate("w1", memory=MemoryState.stack([state]), max_new_tokens=1)
    assert pipeline.generate("w1", memory=store.get([choice.entry.key for choice in chosen]), max_new_tokens=1)


@pytest.mark.parametrize("wrong", [None, 5, 1.5, 1j], ids=repr)
def test_anything_but_prompts_and_texts_is_refused(pipeline, state, store, wrong):
    for ask in (pipeline.generate, pipeline.support):
        with refused("prompts", wrong):
            ask(wrong, memory=state)
    with refused("prompts", wrong):
        pipeline.encode_prompts(wrong)
    for ask in (
        lambda: pipeline.generate([wrong], memory=state),
        lambda: pipeline.surest_answer(wrong, memory=state),
        lambda: pipeline.select(wrong, memory=state, support=True),
        lambda: list(pipeline.stream(wrong, memory=state)),
        lambda: pipeline.format_query(wrong),
    ):
        with pytest.raises(
            TypeError, match=rf"must be a text or a list of chat messages.*, got {type(wrong).__name__}"
        ):
            ask()
    with pytest.raises(TypeError, match="list of texts, got"):
        pipeline.write(wrong)
    with refused("The text", wrong):
        store.key(pipeline, wrong)
    with refused("contexts", wrong):
        pipeline.model.write_many(wrong)


def test_one_prompt_is_not_read_letter_by_letter(pipeline):
    assert torch.equal(pipeline.encode_prompts("w1 w2")[0], pipeline.encode_prompts(["w1 w2"])[0])


@pytest.mark.parametrize("wrong", [5, "abc", [1, 2], 1.5], ids=repr)
def test_anything_but_tensors_is_refused(pipeline, state, wrong):
    model, ids = pipeline.model, tokens(1, 3)
    for call in (model.write, lambda ids, mask: model.update(state, ids, mask), lambda *o: model.fidelity(state, *o)):
        with refused("The attention mask of input_ids", wrong):
            call(ids, wrong)
        with refused("input_ids", wrong):
            call(wrong, None)
    for read in (
        lambda **o: model(input_ids=ids, memory=state, **o),
        lambda **o: model.generate(ids, memory=state, **o),
    ):
        with refused("The attention mask of input_ids", wrong):
            read(attention_mask=wrong)
    with refused("labels", wrong):
        model(input_ids=ids, memory=state, labels=wrong)


@pytest.mark.parametrize("wrong", ["abc", ["a"], {"a": 1}, b"ab"], ids=repr)
def test_anything_but_numbers_is_refused(pipeline, state, wrong):
    model, ids = pipeline.model, tokens(1, 3)
    for name in ("max_new_tokens", "max_length"):
        with refused(name, wrong):
            model.generate(ids, memory=state, **{name: wrong})
    with refused("max_new_tokens", wrong):
        model.reconstruct(state, wrong)
    for name in ("write_steps", "max_targets"):
        with refused(name, wrong):
            model(input_ids=ids, labels=ids, context_input_ids=ids, **{name: wrong})
    with refused("context_index", wrong):
        model.generate(ids, memory=state, context_index=wrong)
    with refused("The index of a MemoryState", wrong):
        state[wrong]


@pytest.mark.parametrize("wrong", [None, 5, [1], b"ab"], ids=repr)
def test_anything_but_paths_is_refused(state, wrong):
    for call in (MemoryState.load, state.save, MemoryStore):
        with refused("path", wrong):
            call(wrong)


@pytest.mark.parametrize("wrong", [None, "the question", 5], ids=repr)
def test_anything_but_a_pipeline_is_refused(store, state, pipeline, wrong):
    for call in (store.choose, store.key, store.add, store.add_document):
        with refused("pipeline", wrong):
            call(wrong, "w1")
    with refused("pipeline", wrong):
        pipeline.write_document("w1 w2").fidelity(pipeline=wrong)
    with refused("tokenizer", wrong):
        GradMemPipeline(pipeline.model, wrong)
    with refused("entry", wrong):
        store.is_whole(wrong)


def test_wrong_types_for_a_store_are_refused(store, state, pipeline):
    for name, wrong in (("offsets", 5), ("metadata", 5), ("metadata", {"a": 1})):
        with refused(name, wrong):
            store.add(pipeline, ["w1"], **{name: wrong})
    with refused("metadata", "abc"):
        store.add_document(pipeline, "w1", metadata="abc")
    with refused("keys"):
        store.get(None)
    with refused("keep", 5):
        store.gc(keep=5)
    with refused("keys", 5):
        store.choose(pipeline, "w1", keys=5)
    with refused("entries", 5):
        store.put(state, 5)
    with refused("Entry 0", "abc"):
        store.put(state, ["abc"])
    with refused("dtype", "float16"):
        state.to("cpu", "float16")
    for call, what in ((MemoryState.stack, "stack"), (MemoryState.concat, "concat")):
        with refused(f"The argument of {what}", 5):
            call(5)
    assert len(store) == 1
