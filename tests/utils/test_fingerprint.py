"""The fingerprint follows what matters and nothing else."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny

from gradmem_adapter import GradMemConfig


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | options)


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config)).eval()


def test_fingerprint_follows_every_weight_that_matters():
    model = make(lora_config=lora(), train_backbone=True, write_head=True)
    seen = {model.fingerprint()}
    for name, parameter in model.named_parameters():
        if "layers.1" in name or "gradmem" in name:
            with torch.no_grad():
                parameter.flatten()[0].add_(0.1)
            seen.add(model.fingerprint())
            assert model.fingerprint() in seen
    changed = sum("layers.1" in name or "gradmem" in name for name, _ in model.named_parameters())
    assert len(seen) == changed + 1


def test_fingerprint_ignores_what_does_not_matter():
    model = make()
    before = model.fingerprint()
    config = model.peft_config["default"]
    config.write_steps, config.write_lr, config.inference_mode = 7, 0.1, True
    model.train()
    assert model.fingerprint() == before
    rounded = tiny().bfloat16()
    prints = []
    for backbone in (copy.deepcopy(rounded), copy.deepcopy(rounded).float()):
        torch.manual_seed(1)
        prints.append(get_peft_model(backbone, GradMemConfig(num_memory_tokens=2)).fingerprint())
    assert prints[0] == prints[1]
