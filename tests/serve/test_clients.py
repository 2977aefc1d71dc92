"""Common clients: `openai` and `langchain-openai`."""

import openai
import pytest
from langchain_openai import ChatOpenAI

MESSAGES = [{"role": "user", "content": "w4 w5"}]


@pytest.fixture
def client(live):
    return openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0)


@pytest.fixture
def memory(client):
    body = {"text": "w1 w2 w3"}
    return [client.post("/memories", body=body, cast_to=object)["id"]]


def expected(pipeline, store, memory):
    state = store.get([entry.key for entry in store.entries(memory[0])])
    return pipeline.generate(MESSAGES, memory=state, max_new_tokens=6, do_sample=False)[0]


def test_the_openai_client(client, memory, pipeline, store):
    said = expected(pipeline, store, memory)
    own = {"model": client.models.list().data[0].id, "max_tokens": 6, "extra_body": {"memory": memory}}
    whole = client.chat.completions.create(messages=MESSAGES, **own)
    assert whole.choices[0].message.content == said
    assert whole.memory[0]["id"] == memory[0]
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **own)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said
    assert len(client.completions.create(prompt="w4 w5", **own).choices[0].text.split()) == 6
    with pytest.raises(openai.NotFoundError, match="no memory"):
        client.chat.completions.create(messages=MESSAGES, **own | {"extra_body": {"memory": ["mem_0"]}})
    with pytest.raises(openai.BadRequestError, match="does not support it"):
        client.chat.completions.create(messages=MESSAGES, tools=[], **own)


async def test_the_langchain_client(live, memory, pipeline, store):
    said = expected(pipeline, store, memory)
    chat = ChatOpenAI(
        base_url=f"{live}/v1", api_key="none", model="gradmem", max_tokens=6, extra_body={"memory": memory}
    )
    answer = chat.invoke("w4 w5")
    assert (answer.text, answer.response_metadata["finish_reason"]) == (said, "length")
    assert answer.usage_metadata["output_tokens"] == 6
    chunks = list(chat.stream("w4 w5"))
    assert "".join(chunk.text for chunk in chunks) == said
    assert [message.text for message in await chat.abatch(["w4 w5"] * 4)] == [said] * 4
    (plain,) = pipeline.generate(MESSAGES, max_new_tokens=6, do_sample=False)
    alone = chat.bind(extra_body={"memory": "auto"}).invoke("w4 w20")  # no memory shares a word with it
    for message, read in ((answer, True), (alone, False)):
        details = message.response_metadata["token_usage"]["prompt_tokens_details"]
        assert (details["memory_vectors"] > 0) == read
    assert chat.bind(extra_body={}).invoke("w4 w5").text == plain
