"""Adapters on tiny models, as tests of PEFT's life cycle need them."""

from peft import LoraConfig, get_peft_model
from tiny import tiny

from gradmem_adapter import GradMemConfig


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | options)


def make(architecture="llama", backbone=None, **config):
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(tiny(architecture, **backbone or {}), GradMemConfig(**defaults | config)).eval()
