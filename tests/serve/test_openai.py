"""OpenAI's API: answers are those of the pipeline, whole and streamed, alone and many at a time."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import pytest
from asking import listening, metric, written
from tiny import tiny_text
from tiny_pipeline import byte_pipeline, tiny_pipeline

from gradmem_adapter import GradMemPipeline, MemoryState
from gradmem_adapter.export.engine import EngineReader
from gradmem_adapter.serve import Limits, create_app, memories, schemas
from gradmem_adapter.serve.memories import Memories
from gradmem_adapter.store import MemoryStore

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def chat(client, content="w4 w5", **more):
    body = {"model": "gradmem", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
    return client.post("/v1/chat/completions", json=body | more)


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def expected(pipeline, store, ids, content="w4 w5", **options):
    keys = [entry.key for identity in ids for entry in store.entries(identity)]
    memory = MemoryState.concat(list(store.get(keys))) if keys else None
    return pipeline.generate([{"role": "user", "content": content}], memory=memory, **GREEDY | options)[0]


@pytest.fixture
def ids(client):
    return [written(client, text)["id"] for text in ("w1 w2 w3", "w6 w7 w8 w9")]


def test_answers_equal_those_of_the_pipeline(client, pipeline, store, ids):
    for memory in ([], ids[:1], ids[1:], ids):
        response = chat(client, memory=memory)
        assert text_of(response) == expected(pipeline, store, memory)
        assert [place["id"] for place in response.json()["memory"]] == memory
    usage = chat(client, memory=ids).json()["usage"]
    prompt = len(pipeline.encode_prompts([[{"role": "user", "content": "w4 w5"}]])[0][0])
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt + 2 * 6, 6)
    assert usage["prompt_tokens_details"]["memory_saved"] == 7 - 2 * 6


def test_concurrent_requests_are_batched_with_the_same_answers(client, pipeline, store, ids):
    asked = [(f"w{i}", memory) for i in range(10) for memory in ([], ids[:1], ids[1:], ids)]
    alone = [expected(pipeline, store, memory, content) for content, memory in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda one: text_of(chat(client, one[0], memory=one[1])), asked))
    assert found == alone
    assert metric(client, "gradmem_read_batch_count") < len(asked) == metric(client, "gradmem_read_batch_sum")


def test_a_stream_adds_up_to_the_whole_answer(client, ids):
    whole = chat(client, memory=ids).json()
    chunks = events(chat(client, memory=ids, stream=True, stream_options={"include_usage": True}))
    *before, last, usage = chunks
    assert (
        "".join(chunk["choices"][0]["delta"]["content"] for chunk in before)
        == whole["choices"][0]["message"]["content"]
    )
    assert len(before) > 3
    assert before[0]["memory"] == whole["memory"]
    assert (last["choices"][0]["finish_reason"], usage["usage"]) == ("length", whole["usage"])


def test_stop_strings_end_an_answer(client, ids):
    words = text_of(chat(client, memory=ids)).split()
    cut = chat(client, memory=ids, stop=words[-1]).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert words[-1] not in cut["message"]["content"]
    chunks = events(chat(client, memory=ids, stop=[words[-1]], stream=True))
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == cut["message"]["content"]


def test_completions_equal_those_of_the_pipeline(client, pipeline, store, ids):
    body = {"model": "gradmem", "prompt": ["w4 w5", "w6"], "memory": ids[:1], "max_tokens": 6}
    found = client.post("/v1/completions", json=body).json()
    state = store.get([entry.key for entry in store.entries(ids[0])])
    assert [choice["text"] for choice in found["choices"]] == pipeline.generate(body["prompt"], memory=state, **GREEDY)
    streamed = events(client.post("/v1/completions", json=body | {"prompt": "w6", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == found["choices"][1]["text"]
    assert client.post("/v1/completions", json=body | {"stream": True}).status_code == 400


def test_sampling_is_reproducible_with_a_seed(client, ids):
    drawn = {text_of(chat(client, memory=ids, temperature=2, seed=i)) for i in range(4)}
    assert len(drawn) > 1
    assert text_of(chat(client, memory=ids, temperature=2, seed=3)) in drawn


def test_memory_auto_lets_the_store_choose(client, pipeline, store, ids):
    response = chat(client, "w7 : Question", memory="auto")
    assert [place["id"] for place in response.json()["memory"]] == ids[1:]
    assert text_of(response) == expected(pipeline, store, ids[1:], "w7 : Question")
    nothing = chat(client, "w33", memory="auto")
    assert nothing.json()["memory"] == []
    assert text_of(nothing) == expected(pipeline, store, [], "w33")


def test_every_answer_names_the_memories_it_was_read_from(client, ids):
    """Or says that there were none, if the store has no text for it."""
    body = {"model": "gradmem", "memory": "auto", "max_tokens": 2}
    prompts = {"w7 : Question": ids[1:], "w33": []}
    whole = client.post("/v1/completions", json=body | {"prompt": list(prompts)}).json()
    assert [[place["id"] for place in choice["memory"]] for choice in whole["choices"]] == list(prompts.values())
    for prompt, choice in zip(prompts, whole["choices"], strict=True):
        streamed = events(client.post("/v1/completions", json=body | {"prompt": prompt, "stream": True}))
        assert streamed[0]["memory"] == choice["memory"]


def test_segments_of_a_long_text_with_words_of_the_question_are_read(client, pipeline, store):
    long = written(client, tiny_text(90))
    entries = list(store.entries(long["id"]))
    assert len(entries) > Limits().states
    word = entries[-1].text.split()[-1]
    chosen = [choice.entry for choice in store.choose(pipeline, word, Limits().states, source=long["id"])]
    response = chat(client, word, memory=[long["id"]])
    assert [place["start"] for place in response.json()["memory"]] == [entry.start for entry in chosen]


def test_a_long_text_without_words_of_the_question_is_refused(client):
    long = written(client, tiny_text(90))
    response = chat(client, "zzz", memory=[long["id"]])
    assert response.status_code == 400, response.text
    said = response.json()["error"]
    assert (said["code"], said["param"]) == ("no_memory_chosen", "memory")
    assert f"have {len(long['segments'])} states, but an answer is read from at most 4" in said["message"]


def test_an_adapter_that_refuses_finds_the_segment_without_shared_words(serve, store, monkeypatch):
    own = tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3")
    client = serve(own)
    long = written(client, tiny_text(90, seed=2))
    states = store.get([entry.key for entry in store.entries(long["id"])])
    question = [{"role": "user", "content": "zzz"}]
    supported = own.support(question, memory=states)
    best = long["segments"][supported.index(max(supported))]
    assert best not in long["segments"][: Limits().states]
    found = chat(client, "zzz", memory=[long["id"]], support=True).json()
    assert [(place["start"], place["end"]) for place in found["memory"]] == [(best["start"], best["end"])]
    assert found["support"] == pytest.approx(max(supported))
    monkeypatch.setattr(memories, "_ASKED_IN_TURN", len(states) - 1)
    assert chat(client, "zzz", memory=[long["id"]]).status_code == 400


def test_an_adapter_that_refuses_is_read_one_state_at_a_time(serve, store):
    own = tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3")
    client = serve(own)
    ids = [written(client, text)["id"] for text in ("w1 w2 w3", "w6 w7 w8 w9")]
    question = [{"role": "user", "content": "w4 w5"}]
    states = store.get([entry.key for identity in ids for entry in store.entries(identity)])
    surest = own.surest_answer(question, memory=states, **GREEDY)
    response = chat(client, memory=ids)
    assert text_of(response) == surest.text
    assert [place["id"] for place in response.json()["memory"]] == [ids[surest.state]]
    for word, identity in zip(("w2", "w8"), ids, strict=True):  # untrained, support is alike, so words decide
        places = chat(client, word, memory=ids).json()["memory"]
        assert [place["id"] for place in places] == [identity]


def test_memories_without_kept_texts_can_be_read(serve, store):
    own = tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3")
    texts = ["w1 w2 w3", "w6 w7 w8 w9"]
    MemoryStore(store.path, keep_text=False).add(own, texts, sources=["one", "other"])
    response = chat(serve(own), "w2", memory=["one", "other"])
    assert response.status_code == 200, response.text
    supported = own.support([{"role": "user", "content": "w2"}], memory=own.write_many(texts))
    best = ["one", "other"][supported.index(max(supported))]
    assert [place["id"] for place in response.json()["memory"]] == [best]


def test_answers_can_be_constrained_to_json(serve):
    client = serve(byte_pipeline())
    schema = {"type": "object", "properties": {"sex": {"enum": ["m", "f"]}}, "required": ["sex"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(text_of(chat(client, response_format=wanted, max_tokens=40)))["sex"] in "mf"
    assert text_of(chat(client, response_format={"type": "json_object"})).startswith("{")
    assert chat(client, response_format={"type": "yaml"}).status_code == 400


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"model": "gpt"}, 404, "only 'gradmem'"),
        ({"memory": ["mem_0"]}, 404, "no memory 'mem_0'"),
        ({"memory": "all"}, 400, "memory"),
        ({"n": 2}, 400, "n: "),
        ({"tools": []}, 400, "tools: This server does not support it"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_tokens": 10**6}, 400, "at most 1,024 tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "w1"}]}, 400, "no message with the role user"),
        ({"messages": [{"role": "user", "content": "w1 " * 200}]}, 400, "too long"),
        ({"messages": [{"role": "user", "content": "w1\0"}]}, 400, "Prompt 0 has a zero byte at position"),
    ],
)
def test_invalid_requests_are_refused(client, more, status, said):
    response = chat(client, **more)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_unknown_paths_and_methods_are_errors(client):
    assert client.get("/v1/models").json()["data"] == [client.get("/v1/models/gradmem").json()]
    for response in (client.get("/v1/embeddings"), client.get("/v1/models/x"), client.get("/nowhere")):
        assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    assert client.put("/v1/memories").status_code == 405


def test_internal_errors_reveal_no_details(client, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "encode_prompts", lambda *args: {}["secret"])
    response = chat(client)
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text


class Slow(EngineReader):
    """An engine that answers until it is told to stop."""

    def __init__(self, model):
        super().__init__(model, check_model=False)
        self.begun, self.closed = threading.Event(), threading.Event()

    def _answers(self, prompts, sampling):
        try:
            while True:
                self.begun.set()
                self.closed.wait(0.01)
                yield 0, [20], False
        finally:
            self.closed.set()


class TestCancelled:
    """A client that disconnects frees the model."""

    @pytest.fixture
    def engine(self, pipeline):
        return Slow(pipeline.model)

    @pytest.fixture
    def client(self, pipeline, engine, store):
        app = create_app(GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=engine), store.path)
        with listening(app) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client

    def test_leaving_a_stream_stops_the_engine(self, client, engine, ids):
        body = {"model": "gradmem", "prompt": "w1", "memory": ids[:1], "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert metric(client, "gradmem_reads_waiting") == 1
        assert engine.closed.wait(60)

    def test_leaving_a_whole_answer_stops_the_engine(self, client, engine, ids):
        body = {"model": "gradmem", "prompt": "w1", "memory": ids[:1]}
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.3)
        assert engine.begun.wait(60)
        assert engine.closed.wait(60)

    def test_prompts_that_are_still_waiting_are_dropped(self, client, ids, monkeypatch):
        begun, gone, looked, find = threading.Event(), threading.Event(), [], Memories.find

        def slowly(*args):
            looked.append(args)
            begun.set()
            gone.wait(60)
            time.sleep(0.2)  # in which the server learns that the client is gone
            return find(*args)

        monkeypatch.setattr(Memories, "find", slowly)
        connection = HTTPConnection(client.base_url.host, client.base_url.port)
        body = {"model": "gradmem", "prompt": ["w1"] * 9, "memory": ids[:1]}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert begun.wait(60)
        assert metric(client, "gradmem_reads_waiting") == 9
        connection.close()
        gone.set()
        until = time.monotonic() + 60
        while metric(client, "gradmem_reads_waiting") and time.monotonic() < until:
            time.sleep(0.01)
        assert metric(client, "gradmem_reads_waiting") == 0
        assert len(looked) < 9

    def test_a_seed_is_refused_with_an_engine(self, client, ids):
        body = {"model": "gradmem", "prompt": "w1", "memory": ids[:1], "seed": 1}
        assert "engine" in client.post("/v1/completions", json=body).json()["error"]["message"]


class Silent(EngineReader):
    """An engine that is silent for a long time."""

    def __init__(self, model):
        super().__init__(model, check_model=False)
        self.begun, self.ended = threading.Event(), threading.Event()

    def _answers(self, prompts, sampling):
        self.begun.set()
        self.ended.wait(30)
        self.ended.set()
        yield 0, [20], True


def test_a_silent_engine_does_not_keep_the_server_from_stopping(pipeline, store, serve):
    engine = Silent(pipeline.model)
    ids = [written(serve(), "w1 w2")["id"]]
    app = create_app(GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=engine), store.path)
    body = {"model": "gradmem", "prompt": "w1", "memory": ids}
    with listening(app) as url, pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
    assert engine.begun.wait(30)
    assert not engine.ended.is_set()
    engine.ended.set()


class Broken(EngineReader):
    """An engine whose connection fails."""

    def _answers(self, prompts, sampling):
        yield 0, [20], False
        raise ConnectionError("nothing listens at secret:8000")


def test_a_failing_engine_is_a_bad_gateway(pipeline, serve):
    client = serve(
        GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=Broken(pipeline.model, check_model=False))
    )
    body = {"model": "gradmem", "prompt": "w1", "memory": [written(client, "w1 w2")["id"]]}
    whole = client.post("/v1/completions", json=body)
    assert (whole.status_code, whole.json()["error"]["code"]) == (502, "engine_failed")
    *_, failed = events(client.post("/v1/completions", json=body | {"stream": True}))
    assert failed == whole.json()
    assert "secret" not in whole.text


def test_too_many_prompts_in_one_request_are_refused(serve, ids):
    client = serve(limits=Limits(reads=2))
    body = {"model": "gradmem", "prompt": ["w1"] * 3}
    refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")  # not 429: a retry would not help
    assert "at most 2 prompts" in refused.json()["error"]["message"]
    assert client.post("/v1/completions", json=body | {"prompt": ["w1"] * 2}).status_code == 200


class TestLooking:
    """The search for the state that holds an answer uses the model before there is a call to answer."""

    @pytest.fixture
    def own(self):
        return tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3")

    @pytest.fixture
    def looking(self, own, monkeypatch):
        """A semaphore that goes up with each search, and an event that lets searches end."""
        begun, go, select = threading.Semaphore(0), threading.Event(), own.select

        def slowly(*args, **how):
            begun.release()
            assert go.wait(60)
            return select(*args, **how)

        monkeypatch.setattr(own, "select", slowly)
        return begun, go

    @pytest.mark.parametrize("stream", [False, True])
    def test_searches_count_as_reads(self, serve, own, looking, stream):
        client, (begun, go) = serve(own, limits=Limits(reads=2)), looking
        ids = [written(client, text)["id"] for text in ("w1 w2 w3", "w6 w7 w8 w9")]
        body = {"model": "gradmem", "prompt": "w1", "memory": ids, "max_tokens": 2, "stream": stream}
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(client.post, "/v1/completions", json=body) for _ in range(2)]
            assert all(begun.acquire(timeout=60) for _ in answers)
            assert metric(client, "gradmem_reads_waiting") == 2
            refused = client.post("/v1/completions", json=body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert not begun.acquire(blocking=False)
            go.set()
            assert [answer.result().status_code for answer in answers] == [200, 200]
        assert metric(client, "gradmem_reads_waiting") == 0
        unknown = client.post("/v1/completions", json=body | {"memory": ["mem_0"]})
        assert (unknown.status_code, metric(client, "gradmem_reads_waiting")) == (404, 0)

    def test_searches_keep_to_the_batch_size(self, serve, own, looking):
        """And do not block anything else."""
        client, (begun, go) = serve(own, limits=Limits(batch=4, states=4)), looking
        ids = [written(client, text)["id"] for text in ("w1 w2 w3", "w6 w7 w8 w9")]
        with ThreadPoolExecutor(45) as threads:
            answers = [threads.submit(chat, client, memory=ids) for _ in range(45)]
            assert begun.acquire(timeout=60)
            until = time.monotonic() + 60
            while metric(client, "gradmem_reads_waiting") < 45 and time.monotonic() < until:
                time.sleep(0.01)
            assert not begun.acquire(blocking=False)
            go.set()
            assert {answer.result().status_code for answer in answers} == {200}


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "Send a string or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type",
            "'text'",
        ),
        ({"messages": [{"role": "user", "content": ["w1"]}]}, "messages[0].content[0]", "object"),
        ({"messages": [{"role": "user", "content": "w1"}, {"role": "robot", "content": ""}]}, "messages[1].role", ""),
        ({"messages": [{"role": "system", "content": "w1"}]}, "messages", "no message with the role user"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "The last user message is empty"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "The last user message is empty"),
        ({"memori": ["mem_1"]}, "memori", "did you mean memory?"),
        ({"colour": 1}, "colour", "does not support it; leave it out."),
        ({"memori": 1, "temperature": 9}, "temperature", "memori: This server does not support it; did you mean"),
        ({"memory": "mem_1"}, "memory", "Send a list of ids, or 'auto'"),
        ({"memory": ["mem_1", 2]}, "memory[1]", "valid string"),
        ({"stop": ["w1", ""]}, "stop[1]", "It must have at least 1 character"),
        ({"stream_options": {"what": 1}}, "stream_options.what", "does not support it"),
        ({"stream_options": {"includes_usage": True}}, "stream_options.includes_usage", "did you mean include_usage?"),
    ],
)
def test_errors_name_the_parameter_as_openai_does(client, more, param, said):
    error = chat(client, **more).json()["error"]
    assert (error["param"], said in error["message"]) == (param, True), error
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/chat/completions", schemas.ChatRequest),
        ("/v1/completions", schemas.CompletionRequest),
        ("/v1/memories", schemas.MemoryRequest),
        ("/v1/recitals", schemas.RecitalRequest),
    ],
)
def test_error_places_never_contain_type_names(client, path, model):
    for name in model.model_fields:
        for wrong in (-1, 3.5, "", {"x": "y"}, [{"x": "y"}], [[1]], [""], [1] * 99):
            error = client.post(path, json={name: wrong}).json()["error"]
            for place in re.findall(r"(?:^|; )([^;]*?): ", error["message"]):
                assert re.fullmatch(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*", place), error


def test_a_body_that_is_not_json_is_refused(client):
    found = client.post("/v1/completions", content=b"w1", headers={"Content-Type": "text/plain"})
    assert (found.status_code, found.json()["error"]["param"]) == (400, None)
    assert "Content-Type: application/json" in found.json()["error"]["message"]
    broken = client.post("/v1/completions", content=b'{"model": w1}', headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, None)
    assert broken.json()["error"]["message"] == "JSON decode error."
