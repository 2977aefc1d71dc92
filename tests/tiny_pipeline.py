"""A pipeline with a tiny random model whose answers do not end by themselves."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline


def tiny_pipeline(seed: int = 0, **config: Any) -> GradMemPipeline:
    backbone = tiny(seed=seed, max_position_embeddings=160)
    backbone.generation_config.eos_token_id = None
    config = {"num_memory_tokens": 3, "write_steps": 1, "write_lr": 0.3} | config
    model = get_peft_model(backbone, GradMemConfig(**config)).eval()
    return GradMemPipeline(model, tiny_tokenizer())
