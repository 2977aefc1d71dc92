"""Tasks that go through LangChain: questions on retrieved documents, and a long conversation."""

import json

import pytest
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer

from evaluation.config import RunConfig
from evaluation.run import Answerer
from gradmem_adapter import GradMemConfig


@pytest.fixture
def measure():
    def run(task, **options):
        config = RunConfig.of({"backbone": "none", "method": {"name": "gradmem"}, "tasks": [task]})
        memory = GradMemConfig(num_memory_tokens=6, trained_length=20, refusal="w40 w41")
        model = get_peft_model(tiny(max_position_embeddings=900), memory).eval()
        return config.tasks[0].measure(Answerer(model, tiny_tokenizer(), config, steps=1), "test", **options)

    return run


@pytest.fixture
def source(tmp_path):
    """Six documents, and questions that share words with them."""
    texts = [tiny_text(12, seed=i).split() for i in range(6)]
    rows = [{"context": " ".join(t), "query": " ".join(t[2:7]), "target": t[0], "answers": [t[0]]} for t in texts]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


@pytest.mark.parametrize(("read", "vectors"), [("each", 6), ("side_by_side", 12), ("text", 0)])
def test_questions_on_retrieved_documents_are_measured(measure, source, read, vectors):
    found = measure({"name": "rag", "source": source, "read": read, "instruction": "w1"}, states=2, limit=4)
    assert {"f1", "exact_match", "found", "prompt_tokens", "seconds"} <= set(found.values)
    assert found.values["found"].mean() > 0.5
    prompt = 5 + 5 + 1 + (24 if read == "text" else vectors)  # template, question, and what comes after it
    assert found.values["prompt_tokens"].tolist() == [prompt] * 4
    assert found.facts == {"context_tokens": 12.0, "documents": 4}


def test_a_conversation_is_measured_with_memory_and_text(measure):
    shown = {
        way: measure({"name": "conversation", "shown": way, "turns": [4, 10]}, limit=1)
        for way in ("memory", "recent", "text")
    }
    for found in shown.values():
        assert {name: len(value) for name, value in found.values.items()} == {
            "after_4": 8, "after_10": 8, "prompt_tokens": 8,
        }  # fmt: skip
    tokens = {way: found.values["prompt_tokens"][0].item() for way, found in shown.items()}
    assert tokens["recent"] < tokens["memory"] < tokens["text"]
    assert [len(line["accepted"]) for line in shown["text"].answers] == [1] * 16


def test_other_methods_than_gradmem_are_refused(source):
    for task in ({"name": "rag", "source": source}, {"name": "conversation"}):
        config = RunConfig.of({"backbone": "none", "method": {"name": "full_context"}, "tasks": [task]})
        with pytest.raises(TypeError, match="needs the method gradmem"):
            config.tasks[0].measure(Answerer(tiny(), tiny_tokenizer(), config, steps=1), "test")
