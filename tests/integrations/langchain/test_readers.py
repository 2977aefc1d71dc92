"""A chat model on a pipeline with an engine reader answers, streams and stops as on one without."""

import pytest
from langchain_core.messages import HumanMessage
from langchain_gradmem import ChatGradMem, MemoryStateStore, attach

from gradmem_adapter import GradMemPipeline
from gradmem_adapter.export.engine import EngineReader


class Words(EngineReader):
    """An engine that answers with the tokens 20, 21, ..., one at a time."""

    def _answers(self, prompts, sampling):
        self.sampling = sampling
        for n in range(sampling.max_new_tokens):
            for i in range(len(prompts)):
                yield i, [20 + n], n + 1 == sampling.max_new_tokens


def test_a_chat_model_answers_streams_and_stops(pipeline):
    other = GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=Words(pipeline.model, check_model=False))
    store = MemoryStateStore()
    chat = ChatGradMem(pipeline=other, store=store, max_tokens=5)
    words = pipeline.tokenizer.decode([20, 21, 22, 23, 24]).split()
    (reference,) = store.write(pipeline, ["w1 w2 w3"])
    message = attach(HumanMessage("w4"), [reference])
    assert chat.invoke([message]).text.split() == words
    assert [answer.text.split() for answer in chat.batch([[message]] * 3)] == [words] * 3
    assert "".join(chunk.text for chunk in chat.stream([message])).split() == words
    assert chat.invoke([message], stop=[words[3]]).text.split() == words[:3]
    assert chat.invoke([HumanMessage("w4")]).text == ChatGradMem(pipeline=pipeline, max_tokens=5).invoke("w4").text


def test_sampling_options_reach_the_engine_and_a_seed_is_refused(pipeline):
    reader = Words(pipeline.model, check_model=False)
    store = MemoryStateStore()
    (reference,) = store.write(pipeline, ["w1 w2 w3"])
    other = GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=reader)
    chat = ChatGradMem(pipeline=other, store=store, max_tokens=5, temperature=0.5, top_p=0.9)
    chat.invoke("w4", memory=reference)
    assert (reader.sampling.temperature, reader.sampling.top_p, reader.sampling.top_k) == (0.5, 0.9, 0)
    with pytest.raises(NotImplementedError, match="logits_processor"):
        chat.invoke("w4", memory=reference, seed=1)
