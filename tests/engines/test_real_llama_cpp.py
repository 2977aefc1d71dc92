"""llama.cpp answers from memory as Transformers does, token for token. Run by `make test-engines`."""

import pytest
from questions import QUESTIONS

from gradmem_adapter import GradMemPipeline
from gradmem_adapter.export import export_model
from gradmem_adapter.export.llama_cpp import LlamaCppReader

llama_cpp = pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def reader(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    export_model(pipeline.model, pipeline.tokenizer, path, gguf="float32")
    return LlamaCppReader(pipeline.model, llama_cpp.Llama(str(path / "model.gguf"), n_ctx=512, verbose=False))


def test_tokens_equal_those_of_transformers(reader, questions):
    given, expected = questions
    assert reader.generate(**given).tolist() == expected.tolist()


def test_a_stream_equals_the_pipelines_answer(reader, pipeline, questions):
    prompt, state = QUESTIONS[0], questions[0]["memory"][0]
    other = GradMemPipeline(pipeline.model, pipeline.tokenizer, reader=reader)
    pieces = list(other.stream(prompt, memory=state, max_new_tokens=24, do_sample=False))
    assert ["".join(pieces)] == pipeline.generate(prompt, memory=state, max_new_tokens=24, do_sample=False)
