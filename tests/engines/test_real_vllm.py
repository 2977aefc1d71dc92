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

from gradmem_adapter import GradMemPipeline
from gradmem_adapter.export import export_model, prompt_embeds
from gradmem_adapter.export.vllm import VLLMReader

vllm = pytest.importorskip("vllm")

SCRIPT = Path(__file__).parents[2] / "examples" / "vllm_server.sh"
SIZES = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 50, "block_size": 32}
LORA = {"enable_lora": True, "max_lora_rank": 16}


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """The folders of both kinds of export."""
    root = tmp_path_factory.mktemp("exported")
    for merge in (True, False):
        export_model(pipeline.model, pipeline.tokenizer, root / str(merge), merge=merge)
    return {merge: root / str(merge) for merge in (True, False)}


def targets(path):
    """What vLLM needs to be told of a LoRA: without it, it dies on the embedding."""
    return sorted(json.loads((path / "lora" / "adapter_config.json").read_text())["target_modules"])


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "LoRA"])
def test_offline(pipeline, questions, exported, merge):
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


def test_server(pipeline, questions, server):
    given, expected = questions
    reader = VLLMReader(pipeline.model, server, name="memory")
    assert reader.generate(**given).tolist() == expected.tolist()


def test_a_stream(pipeline, questions, server):
    other = GradMemPipeline(
        pipeline.model, pipeline.tokenizer, reader=VLLMReader(pipeline.model, server, name="memory")
    )
    prompt, state, options = QUESTIONS[0], questions[0]["memory"][0], {"max_new_tokens": 24, "do_sample": False}
    pieces = list(other.stream(prompt, memory=state, **options))
    assert ["".join(pieces)] == pipeline.generate(prompt, memory=state, **options)


def test_chat(pipeline, questions, server):
    """A client that has the exported states alone, and asks as it would ask any server."""
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
