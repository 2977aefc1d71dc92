"""Tiny models of causal LMs that differ from Llama in one thing each, against plain autograd; all of them are tried by
`python -m evaluation models`."""

import re

import pytest

from evaluation.backbones import sweep as sweeping
from evaluation.backbones.check import check
from evaluation.backbones.sweep import isolated, sweep
from evaluation.results import load_records

RIGHT = {
    "whisper": "its loss does not shift labels; its forward takes position_ids without naming them",
    "roberta": "positions begin behind the padding's",
    "bert": "a layer between trunk and output embeddings",
    "zaya": "pad tokens embed to zeros, where norms have no second derivative",
    "bamba": "generate() takes embeddings that it does not name; cached passes count positions from 0",
    "openai-gpt": "no cache",
    "gemma3": "a language model inside a composite",
    "llama4_text": "a prefix that names no child; a router that is no linear layer",
    "falcon_h1": "its forward asks the trunk for numbers",
    "rembert": "input embeddings of another width",
    "mixtral": "kinks, where finite differences are off",
    "git": "adds positions to embeddings in place",
}
"""Types, and what is special about each."""
REFUSED = {
    "cpmant": "later tokens do",
    "deepseek_v4": "failed on inputs_embeds alone",
    "gemma4_text": "do not exactly match the embedding weights",
    "gemma3n_text": "differ by .* from those of the same tokens as input_ids",
    "musicgen": "several tables of embeddings",
}


@pytest.mark.parametrize("model_type", RIGHT)
def test_special_models_pass(model_type):
    found = check(model_type)
    assert found["verdict"] == "passes", found
    assert len(found["errors"]) == 13
    assert "padded on the left" not in found["reason"]


@pytest.mark.parametrize("model_type", ["bart", "recurrent_gemma"])
def test_models_that_read_left_padding_pass_without_it(model_type):
    """BART counts the padding as positions, RecurrentGemma reads it into its state."""
    found = check(model_type)
    assert (found["verdict"], found["reason"]) == ("passes", "takes no prompts that are padded on the left"), found


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_cannot_be_right_are_refused_when_attached(model_type):
    found = check(model_type)
    assert found["verdict"] == "refused", found
    assert re.search(REFUSED[model_type], found["reason"])


def test_a_sweep_continues_where_it_stopped(tmp_path, monkeypatch):
    tried = []

    def isolated(model_type, limit):
        tried.append(model_type)
        return {
            "verdict": "passes",
            "reason": "",
            "model": model_type.title(),
            "errors": {"read": 1.23e-6, "write": float("inf")},
        }

    monkeypatch.setattr(sweeping, "isolated", isolated)
    monkeypatch.setattr(sweeping, "MODEL_TYPES", ("llama", "gpt2", "bloom"))
    path = tmp_path / "models.jsonl"
    sweep(path, ["gpt2"], show=tried.append)
    found = sweep(path, show=lambda line: None)
    assert tried == ["gpt2", "gpt2: passes", "llama", "bloom"]
    assert {record.dataset for record in found} == {"llama", "gpt2", "bloom"}
    assert load_records(path)[0].metrics == {"read": 1.2e-6, "write": None}
    monkeypatch.setattr(sweeping, "source_digest", lambda: "of changed code")
    sweep(path, show=lambda line: None)
    assert tried[4:] == ["llama", "gpt2", "bloom"]
    with pytest.raises(ValueError, match="no causal LM of type t5"):
        sweep(path, ["t5"])


@pytest.mark.slow
def test_only_a_model_that_takes_too_long_is_stopped():
    assert isolated("llama", 0.01)["reason"] == "takes more than 0 seconds"
    assert isolated("llama", 300)["verdict"] == "passes"
