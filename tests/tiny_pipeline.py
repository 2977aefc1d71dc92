"""Pipelines with tiny random models."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from tiny import tiny, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gradmem_adapter import GradMemConfig, GradMemPipeline


def tiny_pipeline(seed: int = 0, **config: Any) -> GradMemPipeline:
    """A model of words whose answers do not end by themselves."""
    backbone = tiny(seed=seed, max_position_embeddings=160)
    backbone.generation_config.eos_token_id = None
    config = {"num_memory_tokens": 3, "write_steps": 1, "write_lr": 0.3} | config
    model = get_peft_model(backbone, GradMemConfig(**config)).eval()
    return GradMemPipeline(model, tiny_tokenizer())


def byte_pipeline() -> GradMemPipeline:
    """A model of bytes, which can spell anything, with a few more embeddings than its tokenizer has tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = Tokenizer(models.BPE({word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *letters])}, []))
    spelled.pre_tokenizer, spelled.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelled, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    backbone = tiny(vocab_size=264, max_position_embeddings=400)
    config = GradMemConfig(num_memory_tokens=3, write_steps=1, write_lr=0.3)
    return GradMemPipeline(get_peft_model(backbone, config).eval(), tokenizer)
