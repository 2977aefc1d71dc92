"""vLLM answers from memory as Transformers does, token for token. Run by `make test-engines`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from questions import QUESTIONS
from starlette.testclient import TestClient

from gradmem_adapter import GradMemPipeline
from gradmem_adapter.export import export_model, prompt_embeds
from gradmem_adapter.export.vllm import VLLMReader
from gradmem_adapter.serve import create_app

vllm = pytest.importorskip("vllm")

SCRIPT = Path(__file__).parents[2] / "examples" / "vllm_server.sh"
SIZES = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 50, "block_size": 32}
LORA = {"enable_lora": True, "max_lora_rank": 16}


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """The directories of both kinds of export."""
    root = tmp_path_factory.mktemp("exported")
    for merge in (True, False):
        export_model(pipeline.model, pipeline.tokenizer, root / str(merge), merge=merge)
    return {merge: root / str(merge) for merge in (True, False)}


def targets(path):
    """The target modules of the LoRA: unless vLLM is told, it crashes on the embedding."""
    return sorted(json.loads((path / "lora" / "adapter_config.json").read_text())["target_modules"])


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "LoRA"])
def test_offline_tokens_equal_those_of_transformers(pipeline, questions, exported, merge):
    given, expected = questions
    options = {} if merge else LORA | {"lora_target_modules": targets(exported[False])}
    llm = vllm.LLM(str(exported[merge]), enable_prompt_embeds=True, **SIZES, **options)
    reader = VLLMReader(pipeline.model, llm, lora=None if merge else exported[False] / "lora")
    assert reader.generate(**given).tolist() == expected.tolist()


@pytest.fixture(scope="module")
def server(exported):
    """The address of vLLM's server as the example starts it: the backbone as `backbone`, its LoRA as `memory`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["sh", str(SCRIPT), str(exported[False]), *sizes]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=os.environ | {"PORT": str(port), "PATH": path}) as process:
        try:
            while not answers(url):
                assert process.poll() is None, "the server ended"
                time.sleep(2)
            yield url
        finally:
            process.terminate()


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def test_served_tokens_equal_those_of_transformers(pipeline, questions, server):
    given, expected = questions
    reader = VLLMReader(pipeline.model, server, name="memory")
    assert reader.generate(**given).tolist() == expected.tolist()


def test_a_stream_equals_the_pipelines_answer(pipeline, questions, server):
    other = GradMemPipeline(
        pipeline.model, pipeline.tokenizer, reader=VLLMReader(pipeline.model, server, name="memory")
    )
    prompt, state, options = QUESTIONS[0], questions[0]["memory"][0], {"max_new_tokens": 24, "do_sample": False}
    pieces = list(other.stream(prompt, memory=state, **options))
    assert ["".join(pieces)] == pipeline.generate(prompt, memory=state, **options)


def test_chat_with_exported_states(pipeline, questions, server):
    """The client has only the exported states, and asks as it would ask any server."""
    given, expected = questions
    texts, length = prompt_embeds(pipeline.model, given["memory"]), given["input_ids"].shape[1]
    for i, (text, tokens) in enumerate(zip(texts, expected[:, length:].tolist(), strict=True)):
        question = {"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]}
        body = {
            "model": "memory",
            "messages": [{"role": "user", "content": [question, {"type": "prompt_embeds", "data": text}]}],
            "temperature": 0,
            "max_tokens": len(tokens),
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            assert json.load(response)["choices"][0]["token_ids"] == tokens


def test_the_backbone_is_not_mistaken_for_the_adapter(pipeline, questions, server):
    with pytest.raises(RuntimeError, match="does not serve the model"):
        VLLMReader(pipeline.model, server, name="backbone").generate(**questions[0])


def test_a_custom_end_token(pipeline, questions, server):
    """By default vLLM would also end answers at the model's own end token."""
    few = {name: questions[0][name][:5] for name in ("input_ids", "attention_mask", "memory")}
    given = questions[0] | few | {"eos_token_id": 28}
    output = VLLMReader(pipeline.model, server, name="memory").generate(**given)
    assert output.tolist() == pipeline.model.generate(**given).tolist()


TEXTS = (
    "The heron lives on the island of Mull. It eats eels, and its nest is in an old oak by the harbour.",
    "The lighthouse keeper of Orm counts 14 ships each night. He drinks black tea and plays the fiddle.",
)


def test_gradmem_serve(pipeline, server, tmp_path):
    """Memories over HTTP, and answers from them by vLLM."""
    reader = VLLMReader(pipeline.model, server, name="memory")
    app = create_app(GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=reader), tmp_path / "store")
    with TestClient(app, "http://127.0.0.1") as client:
        ids = [client.post("/v1/memories", json={"text": text}).json()["id"] for text in TEXTS]
        own = [pipeline.write(text) for text in TEXTS]
        question = [{"role": "user", "content": "What does the keeper drink?"}]
        for memory, state in ((ids[:1], own[0]), (ids[1:], own[1]), (ids, own[1]), ("auto", own[1])):
            (expected,) = pipeline.generate([question], memory=state, max_new_tokens=24, do_sample=False)
            body = {"model": "gradmem", "messages": question, "memory": memory, "max_tokens": 24}
            whole = client.post("/v1/chat/completions", json=body)
            assert whole.json()["choices"][0]["message"]["content"] == expected
            streamed = client.post("/v1/chat/completions", json=body | {"stream": True})
            lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
            pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
            assert (len(pieces) > 2, "".join(pieces)) == (True, expected)
        longer = {"model": "gradmem", "prompt": "word " * 600, "memory": ids[:1]}
        refused = client.post("/v1/completions", json=longer)
        assert (refused.status_code, "--max-model-len" in refused.text) == (400, True)
