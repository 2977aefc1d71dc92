"""A tiny pipeline and texts for tests of memory stores."""

from __future__ import annotations

from typing import Any

from tiny import tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline, get_peft_model

TEXTS = [tiny_text(length, seed=length) for length in (5, 9, 7, 12)]
NAMES = ["b.txt", "a.txt", "b.txt", "c.txt"]
PLACES = [(0, 10), (0, 20), (10, 30), (5, 40)]


def tiny_pipeline(seed: int = 0, **config: Any) -> GradMemPipeline:
    fields = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3, "probe_backbone": False}
    return GradMemPipeline(get_peft_model(tiny(seed=seed), GradMemConfig(**fields | config)), tiny_tokenizer())
