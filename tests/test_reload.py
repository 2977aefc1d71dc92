"""An adapter opened in a new process, or by each of PEFT's ways, writes and answers bit for bit the same."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens
from transformers import AutoModelForCausalLM

from gradmem_adapter import GradMemConfig


def digest(model):
    """State bytes and generated text of a fixed job."""
    state = model.write(tokens(2, 9), torch.tensor([[1] * 9, [0] * 3 + [1] * 6]))
    text = model.generate(tokens(2, 4), memory=state, max_new_tokens=6, do_sample=False)
    return hashlib.sha256(state.to_bytes() + text.numpy().tobytes()).hexdigest()


@pytest.fixture(params=ARCHITECTURES)
def saved(request, tmp_path):
    """A backbone and an adapter with every trained tensor of the method, on disk, and what the adapter gives."""
    tiny(request.param).save_pretrained(tmp_path / "backbone")
    config = GradMemConfig(
        num_memory_tokens=3, write_lr=0.3, learn_write_lr="scalar", memory_projection="shared", write_head=True,
        num_control_tokens=1, lora_phase="write",
        lora_config=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, digest(model)


def test_by_each_way(saved):
    path, expected = saved
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        backbone = AutoModelForCausalLM.from_pretrained(path / "backbone")
        model = PeftModel.from_pretrained(backbone, path / "adapter", **options).eval()
        assert digest(model) == expected, options
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert bool(trainable) == bool(options.get("is_trainable"))
        assert all("gradmem_" in name or "lora_" in name for name in trainable)
        assert not any(parameter.is_meta for parameter in model.parameters())
    assert digest(AutoPeftModelForCausalLM.from_pretrained(path / "adapter").eval()) == expected


def test_in_a_new_process(saved):
    path, expected = saved
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gradmem_adapter; from test_reload import *; "
        "torch.set_num_threads(int(sys.argv[3])); "
        "print(digest(AutoPeftModelForCausalLM.from_pretrained(sys.argv[2]).eval()))"
    )
    arguments = [str(Path(__file__).parent), str(path / "adapter"), str(torch.get_num_threads())]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == expected


def test_without_the_package_peft_says_the_key(saved):
    path, _ = saved
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    arguments = [str(path / "adapter")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "KeyError: 'GRADMEM'" in result.stderr
