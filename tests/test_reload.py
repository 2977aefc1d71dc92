"""An adapter opened in a new process, or by each of PEFT's ways, writes and answers bit for bit the same."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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


def test_an_adapter_reloads_in_each_of_pefts_ways(saved):
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


def test_an_adapter_reloads_in_a_new_process(saved):
    path, expected = saved
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gradmem_adapter; from test_reload import *; "
        "torch.set_num_threads(int(sys.argv[3])); "
        "print(digest(AutoPeftModelForCausalLM.from_pretrained(sys.argv[2]).eval()))"
    )
    arguments = [str(Path(__file__).parent), str(path / "adapter"), str(torch.get_num_threads())]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == expected


@pytest.mark.parametrize("saved", ["llama"], indirect=True)  # no model is opened
def test_without_the_package_peft_raises_a_key_error(saved):
    path, _ = saved
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    arguments = [str(path / "adapter")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "KeyError: 'GRADMEM'" in result.stderr


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_missing_and_unknown_tensors_are_refused_when_peft_loads(architecture, options, tmp_path):
    """PEFT would leave a LoRA at its initial values if the file lacks it."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(tiny(architecture), GradMemConfig(num_memory_tokens=3, lora_config=lora))
    adapter.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    of_lora = sorted(name for name in whole if "lora_A" in name)
    of_backbone = next(n for n, _ in adapter.named_parameters() if n.endswith("base_layer.weight"))
    slots = next(name for name in whole if name.endswith("gradmem_memory"))
    wrong = {
        f"{of_lora[0].removesuffix('.weight')}.default.weight' is missing": lambda tensors: tensors.pop(of_lora[0]),
        r"memory_slots\.gradmem_memory\.default' is missing": lambda tensors: tensors.pop(slots),
        "lora_C' is unknown": lambda tensors: tensors.update({"base_model.model.lora_C": torch.ones(1)}),
        f"{of_backbone}' is unknown": lambda tensors: tensors.update({of_backbone: torch.ones(1)}),
    }
    for said, change in wrong.items():
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(ValueError, match=rf"do not match the adapter 'default'.*{said}"):
            PeftModel.from_pretrained(tiny(architecture), tmp_path, **options)
        with pytest.raises(ValueError, match="do not match the adapter 'second'"):
            get_peft_model(tiny(architecture), GradMemConfig()).load_adapter(tmp_path, "second")
    embeddings = {f"base_model.model.{n}": p for n, p in tiny(architecture).state_dict().items() if "embed_tokens" in n}
    save_file(whole | embeddings, file)
    PeftModel.from_pretrained(tiny(architecture), tmp_path, **options)
