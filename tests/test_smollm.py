"""A few checks on the real SmolLM2-135M-Instruct."""

import pytest
import torch
from peft import get_peft_model
from rich.console import Console

from benchmarks import textbook
from gradmem_adapter import SMOLLM2, GradMemConfig, GradMemPipeline, MemoryState, load_backbone
from gradmem_adapter.cli.demos.recite import demo_text, run_recite_demo

pytestmark = pytest.mark.smollm
TEXTS = ["The lighthouse keeper of Orm counts 14 ships each night.", "Two foxes sleep."]


@pytest.fixture(scope="module")
def pipeline():
    backbone, tokenizer = load_backbone(SMOLLM2)
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=4, memory_init="vocab", write_lr=0.1, query_format="chat")
    return GradMemPipeline(get_peft_model(backbone, config).eval(), tokenizer)


def test_write_matches_the_equation_and_padding_changes_nothing(pipeline):
    model, tokenizer = pipeline.model, pipeline.tokenizer
    states = pipeline.write(TEXTS)
    for text, state in zip(TEXTS, states, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        slots = model.base_model.slots.gradmem_memory["default"].detach()
        expected = textbook.write(model.get_base_model(), slots, ids, 2, 0.1).detach()
        torch.testing.assert_close(state.vectors, expected, rtol=1e-3, atol=1e-4)


def test_a_sentence_is_reconstructed_from_a_saved_state(pipeline, tmp_path):
    text = TEXTS[0]
    state = pipeline.write(text, steps=200, lr=0.03, optimizer="adam", stop_when_recovered=True)
    state.save(tmp_path / "state.safetensors")
    state = MemoryState.load(tmp_path / "state.safetensors")
    assert pipeline.fidelity(text, state).greedy.item() == 1
    assert pipeline.reconstruct(state) == [text]


def test_a_chat_question_is_answered_with_and_without_memory(pipeline):
    state = pipeline.write(TEXTS[0])
    options = {"max_new_tokens": 8, "do_sample": False}
    question = "What is the capital of France?"
    assert "Paris" in pipeline.generate(question, **options)[0]
    answer = pipeline.generate(question, memory=state, **options)[0]
    assert answer
    assert question not in answer
    assert "".join(pipeline.stream(question, memory=state, **options)) == answer


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_recites_whatever_the_seed(seed):
    result = run_recite_demo(demo_text(), seed=seed, console=Console(quiet=True))
    assert result["reconstructed"]
    assert result["memory_tokens"] * 4 <= result["context_tokens"]
