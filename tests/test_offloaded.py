"""A backbone whose weights accelerate keeps in CPU memory or on a disk gives the same results."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from adapters import lora
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from tiny import tiny, tokens
from transformers import AutoModelForCausalLM

from gradmem_adapter import GradMemConfig, load_backbone, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def in_cpu_memory(backbone, folder):
    return cpu_offload(backbone, execution_device=CPU)


def on_a_disk(backbone, folder):
    return disk_offload(backbone, folder / "offload", execution_device=CPU)


def one_layer_on_a_disk(backbone, folder):
    backbone.save_pretrained(folder / "saved")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=places | {"model.layers.1": "disk"}, offload_folder=folder / "offload"
    ).eval()


def attached(backbone, **config):
    options = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3, "memory_init_std": 0.5, "lora_config": lora()}
    return get_peft_model(backbone, GradMemConfig(**options | config)).eval()


def everything(model):
    contexts, queries = tokens(2, 9), tokens(2, 5, seed=1)
    state = model.write(contexts)
    found = [state.vectors, model.write(contexts).vectors, state.write_losses]
    found += [model(input_ids=queries, memory=state).logits, model.fidelity(state, contexts).greedy]
    found.append(model.generate(queries, memory=state, max_new_tokens=4, do_sample=False))
    model(input_ids=queries, labels=queries, context_input_ids=contexts).loss.backward()
    return [*found, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)]


@pytest.mark.parametrize("place", [in_cpu_memory, on_a_disk, one_layer_on_a_disk])
@pytest.mark.parametrize("config", [{}, {"write_head": True, "memory_init": "vocab", "start": "context"}])
def test_a_model_with_offloaded_weights_gives_the_same_results(place, config, tmp_path):
    plain, offloaded = attached(tiny(), **config), attached(place(tiny(), tmp_path), **config)
    set_peft_model_state_dict(offloaded, get_peft_model_state_dict(plain))
    assert offloaded.fingerprint() == plain.fingerprint()
    for found, expected in zip(everything(offloaded), everything(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_new_adapters_on_offloaded_layers_are_initialised_as_usual(tmp_path):
    torch.manual_seed(1)
    model = attached(on_a_disk(tiny(), tmp_path), lora_config=lora(init_lora_weights=True))
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert weights
    for name, weight in weights.items():
        assert weight.device == CPU
        assert bool(weight.any()) == ("lora_A" in name)
    model.add_adapter("other", GradMemConfig(num_memory_tokens=2, lora_config=lora()))
    for name, weight in weights.items():  # those of the first stay
        torch.testing.assert_close(model.get_parameter(name), weight)


def test_checkpoints_open_on_offloaded_backbones(tmp_path, llama_directory):
    backbone, tokenizer = load_backbone(str(llama_directory))
    model = attached(backbone)
    save_checkpoint(model, tokenizer, tmp_path / "adapter")
    other = disk_offload(load_backbone(str(llama_directory))[0], tmp_path / "offload", execution_device=CPU)
    loaded, _ = load_checkpoint(tmp_path / "adapter", backbone=other)
    ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(loaded.write(ids).vectors, model.write(ids).vectors)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "orthogonal"}, {"target_modules": ["embed_tokens"]}]
)
def test_loras_that_need_the_weights_are_refused_on_offloaded_layers(options, tmp_path):
    with pytest.raises(NotImplementedError, match="Only linear layers can have a LoRA if they are offloaded"):
        attached(on_a_disk(tiny(), tmp_path), lora_config=lora(**options))


def test_peft_does_not_write_into_the_files_of_a_backbone_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT takes the first slash off a path, so it finds only files at relative ones
    attached(tiny()).save_pretrained("adapter")
    backbone = one_layer_on_a_disk(tiny(), Path())
    before = Path("saved/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="hooks that load them were removed"):
        PeftModel.from_pretrained(backbone, "adapter")
    assert Path("saved/model.safetensors").read_bytes() == before
