"""`gradmem export` and `gradmem export-states`."""

import json

import torch
from commands import invoke
from transformers import AutoModelForCausalLM

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.export import prompt_embeds


def test_a_model_is_exported(checkpoint, tmp_path):
    result = invoke("export", checkpoint, tmp_path / "model", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(checkpoint, dtype=torch.bfloat16)[0].fingerprint() in result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    again = invoke("export", checkpoint, tmp_path / "model")
    assert (again.exit_code, "not empty" in again.output) == (2, True)


def test_states_are_exported(checkpoint, tmp_path):
    model, tokenizer = load_checkpoint(checkpoint)
    states = GradMemPipeline(model, tokenizer).write(["w1 w2 w3", "w4 w5"])
    states.save(tmp_path / "states.safetensors")
    arguments = ("export-states", tmp_path / "states.safetensors", tmp_path / "out.jsonl", "--checkpoint", checkpoint)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt_embeds"] for row in rows] == prompt_embeds(model, states)
    assert [row["context_tokens"] for row in rows] == [3, 2]
    assert {row["fingerprint"] for row in rows} == {model.fingerprint()}
    again = invoke(*arguments)
    assert (again.exit_code, "exists" in again.output) == (2, True)
