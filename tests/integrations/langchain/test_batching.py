"""A batch of conversations is one batch of the model."""

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_gradmem import ChatGradMem, MemoryStateStore, attach


@pytest.fixture
def chat(pipeline):
    return ChatGradMem(pipeline=pipeline, store=MemoryStateStore(), max_tokens=6)


@pytest.fixture
def reference(pipeline, chat):
    return chat.store.write(pipeline, ["w1 w2 w3 w4 w5 w6 w7 w8"])[0]


@pytest.fixture
def other(pipeline, chat):
    return chat.store.write(pipeline, ["w9 w10 w11"])[0]


def test_a_batch_of_calls_is_one_batch_of_the_model(chat, pipeline, reference, monkeypatch):
    one_by_one = [chat.invoke(f"w{i} w1", memory=reference).content for i in range(4)]
    sizes = []
    generate = pipeline.generate_ids

    def count(*args, **kwargs):
        sizes.append(len(args[0]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(pipeline, "generate_ids", count)
    monkeypatch.setattr("gradmem_adapter.answering.batching._WINDOW", 0.5)  # for a loaded machine
    calls = []

    class Handler(BaseCallbackHandler):
        def on_llm_end(self, response, **kwargs):
            calls.append(response.generations[0][0].text)

    messages = chat.batch([f"w{i} w1" for i in range(4)], {"callbacks": [Handler()]}, memory=reference)
    assert [m.content for m in messages] == one_by_one
    assert sizes == [4]
    assert sorted(calls) == sorted(one_by_one)


def test_rows_of_a_batch_that_stop_early_count_no_padding(chat):
    stop = [chat.invoke("w3 w4", max_tokens=8).content.split()[3]]
    inputs = ["w3 w4", "w5", "w6 w7 w8"]
    single = [chat.invoke(value, stop=stop, max_tokens=8) for value in inputs]
    assert len({message.usage_metadata["output_tokens"] for message in single}) > 1
    for message, expected in zip(chat.batch(inputs, stop=stop, max_tokens=8), single, strict=True):
        assert message.content == expected.content
        assert message.usage_metadata == expected.usage_metadata
        assert message.response_metadata == expected.response_metadata


def test_a_batch_with_an_error_gives_the_others_their_answers(chat):
    good, bad = chat.batch(["w3", [SystemMessage("w1")]], return_exceptions=True)
    assert good.content == chat.invoke("w3").content
    assert isinstance(bad, ValueError)


def test_batches_of_different_memories_agree_with_single_calls(chat, reference, other):
    inputs = [
        [attach(HumanMessage("w3"), [reference])],
        [HumanMessage("w3")],
        [attach(HumanMessage("w5"), [other])],
        [attach(HumanMessage("w5"), [reference, other])],
    ]
    assert [m.content for m in chat.batch(inputs)] == [chat.invoke(value).content for value in inputs]
