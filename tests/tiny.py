"""Tiny random models of several architectures, in seconds and without a network."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "gemma3_text", "mistral")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"head_dim": 8, "sliding_window": 12},
}


def tiny(architecture: str = "llama", seed: int = 0, scale: float = 4.0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM in eval mode; weights are scaled up so that its predictions are not all alike."""
    fields = _COMMON | _SPECIAL[architecture] | overrides
    if architecture == "gpt2":
        fields = {
            "vocab_size": fields["vocab_size"], "n_embd": fields["hidden_size"], "n_head": 4,
            "n_layer": fields["num_hidden_layers"], "n_positions": fields["max_position_embeddings"],
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        } | overrides  # fmt: skip
    elif architecture in ("gpt_neox", "opt"):
        fields.pop("num_key_value_heads")
        if architecture == "opt":
            fields.pop("intermediate_size")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    model.generation_config.pad_token_id = 0
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] token ids that are never pad, bos or eos."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
