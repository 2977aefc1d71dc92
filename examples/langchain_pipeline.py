"""The model of the LangChain examples: a checkpoint, or SmolLM2-135M-Instruct with slots that are not trained.

Without meta-training the memory holds a text, by tens of Adam steps, but the model does not answer well from it. The
examples show what travels where and what it saves; an adapter that is trained on questions makes the answers good.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from gradmem_adapter import (
    SMOLLM2,
    GradMemConfig,
    GradMemPipeline,
    WriteOptions,
    get_peft_model,
    load_backbone,
    load_checkpoint,
)


def arguments(description: str | None, **options: Any) -> argparse.Namespace:
    """The arguments that all examples take, and some of their own: name=default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", help="a directory that load_checkpoint opens; default: SmolLM2, not trained")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def open_pipeline(checkpoint: str | None) -> tuple[GradMemPipeline, WriteOptions]:
    """The pipeline, and how it writes."""
    if checkpoint is not None:
        return GradMemPipeline(*load_checkpoint(checkpoint)), WriteOptions()
    torch.manual_seed(0)
    backbone, tokenizer = load_backbone(SMOLLM2)
    config = GradMemConfig(num_memory_tokens=8, memory_init="vocab", query_format="chat")
    model = get_peft_model(backbone, config).eval()
    return GradMemPipeline(model, tokenizer), WriteOptions(steps=10, lr=0.03, optimizer="adam")
