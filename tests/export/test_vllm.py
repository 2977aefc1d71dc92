"""What vLLM is sent, offline and over HTTP, recorded by fakes; tests/engines uses the real one."""

import base64
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import torch
from adapters import make
from engine_threads import at_once
from tiny import tiny_tokenizer, tokens

from gradmem_adapter import GradMemPipeline, MemoryState
from gradmem_adapter.export.vllm import VLLMReader

GREEDY = {"max_new_tokens": 6, "do_sample": False}
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.fixture(scope="module")
def model():
    model = make(num_control_tokens=1)
    model.get_base_model().generation_config.eos_token_id = [2, 7]
    return model


@pytest.fixture(scope="module")
def states(model):
    return model.write(tokens(2, 9))


class Server(ThreadingHTTPServer):
    """Answers each prompt with the tokens 10, 11, ..., in chunks; prompts in reverse."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.headers, self.status, self.chunks, self.body = [], [], 200, None, None
        self.names = ["exported", "lora"]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": name} for name in self.server.names]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.server.headers.append(dict(self.headers))
        chunks = self.server.chunks or [
            {"choices": [{"index": i, "token_ids": [10 + n], "finish_reason": None if n < 5 else "length"}]}
            for n in range(6)
            for i in reversed(range(len(body["prompt_embeds"])))
        ]
        events = [*map(json.dumps, chunks), "[DONE]"]
        self.answer("".join(f"data: {event}\n\n" for event in events).encode())

    def answer(self, data):
        data, length = self.server.body or data, len(data)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def decoded(text):
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)


class TestServer:
    def test_the_server_gets_memory_and_embedded_prompts(self, model, states, server):
        ids = tokens(2, 4, seed=1)
        output = VLLMReader(model, server.url, check_model=False).generate(ids, MASK, memory=states, **GREEDY)
        assert output.tolist() == [[*row, 10, 11, 12, 13, 14, 15] for row in ids.tolist()]
        ((path, body),) = server.asked
        assert path == "/v1/completions"
        prefix, embed = model.prefix_embeddings(states), model.get_input_embeddings()
        for text, memory, row, counts in zip(body.pop("prompt_embeds"), prefix, ids, MASK, strict=True):
            assert torch.equal(decoded(text), torch.cat([memory, embed(row[counts.bool()])]))
        assert body == {
            "model": "exported", "max_tokens": 6, "stop_token_ids": [2, 7], "temperature": 0.0, "top_k": 0,
            "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "stream": True,
            "return_token_ids": True,
        }  # fmt: skip

    def test_the_url_may_end_in_v1_and_need_a_key(self, model, states, server):
        reader = VLLMReader(model, server.url + "/v1/", name="lora", api_key="secret", check_model=False)
        reader.generate(tokens(1, 4), memory=states[0], **GREEDY)
        assert server.asked[0][0] == "/v1/completions"
        assert server.asked[0][1]["model"] == "lora"
        assert server.headers[0]["Authorization"] == "Bearer secret"

    def test_answers_can_be_streamed(self, model, states, server):
        server.chunks = [
            {"choices": [{"index": 0, "token_ids": [20, 21], "finish_reason": None}]},
            {"choices": [{"index": 0, "token_ids": [2], "finish_reason": "stop"}]},
        ]
        pipeline = GradMemPipeline(model, tiny_tokenizer(), reader=VLLMReader(model, server.url, check_model=False))
        text = pipeline.tokenizer.decode([20, 21])
        assert "".join(pipeline.stream("w1 w2", memory=states[0], **GREEDY)) == text
        assert pipeline.generate("w1 w2", memory=states[0], **GREEDY) == [text]

    def test_errors_of_the_server_are_passed_on(self, model, states, server):
        server.status = 400
        server.chunks = [{"error": {"message": "This model's maximum context length is 64 tokens."}}]
        reader = VLLMReader(model, server.url, name="exported", check_model=False)
        with pytest.raises(RuntimeError, match=r"\(400\).*maximum context length"):
            reader.generate(tokens(1, 4), memory=states[0], **GREEDY)
        server.status = 200
        with pytest.raises(RuntimeError, match="maximum context length"):
            reader.generate(tokens(1, 4), memory=states[0], **GREEDY)

    def test_a_prompt_too_long_for_the_server_is_a_value_error(self, model, states, server):
        server.status = 400
        server.body = b'{"error": {"message": "maximum context length", "param": "input_tokens", "code": 400}}'
        with pytest.raises(ValueError, match="--max-model-len"):
            VLLMReader(model, server.url, name="exported").generate(tokens(1, 4), memory=states[0], **GREEDY)

    @pytest.mark.parametrize(
        "choice",
        [
            {"index": 1, "token_ids": [20]},
            {"index": "0", "token_ids": [20]},
            {"index": 0, "token_ids": ["20"]},
            {"index": 0, "text": "w18"},
        ],
    )
    def test_malformed_pieces_are_refused(self, model, states, server, choice):
        server.chunks = [{"choices": [choice | {"finish_reason": "stop"}]}]
        reader = VLLMReader(model, server.url, name="exported", check_model=False)
        with pytest.raises(ConnectionError, match="does not respond like vLLM"):
            reader.generate(tokens(1, 4), memory=states[0], **GREEDY)

    @pytest.mark.parametrize("body", [b"<html>Hello</html>", b"[]", b'{"detail": "Not"}', b"\xff"])
    def test_another_kind_of_server_is_refused(self, model, states, server, body):
        server.body = body
        with pytest.raises(ConnectionError, match="does not respond like vLLM"):
            VLLMReader(model, server.url).generate(tokens(1, 4), memory=states[0], **GREEDY)

    def test_a_restarted_server_is_checked_again(self, model, states, server):
        ids = tokens(1, 4)
        right = model.generate(ids, memory=states[0], **GREEDY | {"max_new_tokens": 8, "eos_token_id": None})[0, 4:]
        server.chunks = [{"choices": [{"index": 0, "token_ids": right.tolist(), "finish_reason": "length"}]}]
        reader = VLLMReader(model, server.url)
        options = GREEDY | {"max_new_tokens": 8}
        for _ in range(2):
            assert reader.generate(ids, memory=states[0], **options)[0, 4:].tolist() == right.tolist()
        assert [body["max_tokens"] for _, body in server.asked] == [8, 8, 8]
        server.body = b'data: {"choices": ['  # it is killed
        with pytest.raises(ConnectionError):
            reader.generate(ids, memory=states[0], **options)
        server.body, server.names = None, ["other"]
        server.chunks = [{"choices": [{"index": 0, "token_ids": (right - 1).tolist(), "finish_reason": "length"}]}]
        with pytest.raises(RuntimeError, match="does not serve the model"):
            reader.generate(ids, memory=states[0], **options)
        assert server.asked[-1][1]["model"] == "other"

    def test_an_unreachable_server_and_an_invalid_url_are_refused(self, model, states):
        with pytest.raises(ConnectionError, match="no vLLM server"):
            VLLMReader(model, "http://127.0.0.1:9").generate(tokens(1, 4), memory=states[0], **GREEDY)
        with pytest.raises(ValueError, match="must begin with http"):
            VLLMReader(model, "127.0.0.1:9")

    @pytest.mark.parametrize("key", ["secret\n", "secret\r\nX: y", "sécret", "secret\0"])
    def test_a_key_that_cannot_be_sent_is_refused_at_once_and_not_shown(self, model, key):
        with pytest.raises(ValueError, match="not allowed in an HTTP header") as error:
            VLLMReader(model, "http://127.0.0.1:9", api_key=key)
        assert "cret" not in str(error.value)

    def test_a_non_finite_state_is_not_sent(self, model, states, server):
        vectors = states.vectors * torch.tensor(float("nan"))
        broken = MemoryState(vectors, states.context_tokens, states.write_losses, states.fingerprint)
        with pytest.raises(ValueError, match="not finite"):
            VLLMReader(model, server.url, check_model=False).generate(tokens(2, 4), memory=broken, **GREEDY)
        assert server.asked == []

    def test_a_lora_directory_is_refused_for_a_server(self, model):
        with pytest.raises(ValueError, match="--lora-modules"):
            VLLMReader(model, "http://localhost:8000", lora="exported/lora")


class Llm:
    """`vllm.LLM` as far as it is used."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, parameters, lora_request=None, use_tqdm=True):
        self.asked.append((prompts, parameters, lora_request, use_tqdm))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(12, 13 + i, 2))]) for i in range(len(prompts))]


@pytest.fixture
def llm(monkeypatch):
    vllm, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.SamplingParams, request.LoRARequest = dict, lambda *given: given
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Llm()


class TestLlm:
    def test_the_engine_gets_memory_and_tokens(self, model, states, llm):
        ids = tokens(2, 4, seed=1)
        output = VLLMReader(model, llm, check_model=False).generate(ids, MASK, memory=states, **GREEDY)
        assert output[:, 4:].tolist() == [[12, 13, 2], [12, 14, 2]]
        ((prompts, parameters, lora, use_tqdm),) = llm.asked
        length = model.prefix_length
        for prompt, memory, row, counts in zip(prompts, model.prefix_embeddings(states), ids, MASK, strict=True):
            query = row[counts.bool()].tolist()
            assert torch.equal(prompt["prompt_embeds"][:length], memory)
            assert not prompt["prompt_embeds"][length:].any()
            assert prompt["prompt_token_ids"][length:] == query
            assert prompt["prompt_is_token_ids"] == [False] * length + [True] * len(query)
            assert {len(part) for part in prompt.values()} == {length + len(query)}
        assert (lora, use_tqdm) == (None, False)
        assert parameters == {
            "max_tokens": 6, "stop_token_ids": [2, 7], "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
            "repetition_penalty": 1.0, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip

    def test_a_lora_is_passed_on(self, model, states, llm, tmp_path):
        VLLMReader(model, llm, lora=tmp_path / "lora", check_model=False).generate(
            tokens(1, 4), memory=states[0], **GREEDY
        )
        assert llm.asked[0][2][2] == str(tmp_path / "lora")

    def test_each_lora_has_its_own_name_and_number(self, model, states, llm, tmp_path):
        """vLLM caches LoRAs by both: the first would otherwise answer for the second."""
        for lora in (tmp_path / "one", tmp_path / "two", f"{tmp_path}/one/"):
            VLLMReader(model, llm, lora=lora, check_model=False).generate(tokens(1, 4), memory=states[0], **GREEDY)
        (name, number, _), (other, another, _), again = (request for _, _, request, _ in llm.asked)
        assert again[:2] == (name, number)
        assert name != other
        assert number != another
        assert 0 < min(number, another) <= max(number, another) < 2**31

    def test_one_reader_at_a_time_uses_the_engine(self, model, states, llm):
        at_once(lambda: VLLMReader(model, llm, check_model=False), llm, "generate", states[0])
