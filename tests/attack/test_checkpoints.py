"""Checkpoints whose tensors do not fit their configuration are refused before anything changes."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from gradmem_adapter import GradMemConfig, load_checkpoint, save_checkpoint

WEIGHTS = "adapter_model.safetensors"
MEMORY = "base_model.model.memory_slots.gradmem_memory"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with a LoRA and without digests, as PEFT saves it."""
    config = GradMemConfig(num_memory_tokens=3, lora_config={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    save_checkpoint(get_peft_model(tiny(), config), tiny_tokenizer(), tmp_path / "saved")
    (tmp_path / "saved" / "SHA256SUMS").unlink()
    return tmp_path / "saved"


def change(saved, function):
    tensors = load_file(saved / WEIGHTS)
    function(tensors)
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})


def refused(saved, match):
    backbone = tiny()
    backbone.lm_head.requires_grad_(False)
    before = {
        name: (tensor.clone(), tensor.requires_grad) for name, tensor in backbone.state_dict(keep_vars=True).items()
    }
    with pytest.raises(ValueError, match=match):
        load_checkpoint(saved, backbone=backbone)
    after = backbone.state_dict(keep_vars=True)
    assert after.keys() == before.keys(), "the caller's backbone must be without an adapter again"
    assert all(torch.equal(tensor, before[name][0]) for name, tensor in after.items())
    assert {name: tensor.requires_grad for name, tensor in after.items()} == {name: before[name][1] for name in before}
    assert backbone.config.vocab_size == backbone.vocab_size == len(backbone.get_input_embeddings().weight)


def test_a_backbone_is_not_resized_for_a_refused_checkpoint(saved, tmp_path):
    """A checkpoint may bring its own embeddings; everything else is compared before they are used."""
    tiny().save_pretrained(tmp_path / "base")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    head = {"write_head": True, "lora_config": {"r": 2, "target_modules": ["lm_head", "q_proj"]}}
    backbone.resize_token_embeddings(70, mean_resizing=False)
    save_checkpoint(get_peft_model(backbone, GradMemConfig(**head)), tiny_tokenizer(), tmp_path / "resized")
    (tmp_path / "resized" / "SHA256SUMS").unlink()
    opened = tiny()
    load_checkpoint(tmp_path / "resized", backbone=opened)
    assert len(opened.lm_head.weight) == 70
    change(tmp_path / "resized", lambda tensors: tensors.update({MEMORY: torch.zeros(4, 32)}))
    refused(tmp_path / "resized", r"has shape \(4, 32\) in the checkpoint and \(16, 32\) in the model")
    embeddings = {f"base_model.model.{name}.weight": torch.zeros(70, 32) for name in ("model.embed_tokens", "lm_head")}
    change(saved, lambda tensors: tensors.update(embeddings | {"x": torch.zeros(1)}))
    refused(saved, "tensor 'x' is unknown")


def test_the_undamaged_checkpoint_opens(saved):
    model, _ = load_checkpoint(saved, backbone=tiny())
    assert torch.equal(model.base_model.slots.gradmem_memory["default"], load_file(saved / WEIGHTS)[MEMORY])


def test_a_missing_memory_is_refused(saved):
    change(saved, lambda tensors: tensors.pop(MEMORY))
    refused(saved, r"tensor '.*gradmem_memory' is missing")


def test_a_missing_lora_tensor_is_refused(saved):
    change(saved, lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)))
    refused(saved, r"tensor '.*lora_B.*' is missing")


@pytest.mark.parametrize(
    "name",
    ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight", "model.embed_tokens.weight", "x"],
)
def test_tensors_of_the_backbone_are_refused(saved, name):
    change(saved, lambda tensors: tensors.update({name: torch.full((61, 32), 7.0)}))
    refused(saved, rf"tensor '{name}' is unknown")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 32), r"has shape \(4, 32\) in the checkpoint and \(3, 32\) in the model"),
        (torch.zeros(96), r"has shape \(96,\)"),
        (torch.zeros(3, 32, dtype=torch.long), "is torch.int64 in the checkpoint and torch.float32 in the model"),
        (torch.zeros(3, 32, dtype=torch.complex64), "is torch.complex64 in the checkpoint"),
    ],
)
def test_wrong_shapes_and_types_are_named(saved, tensor, message):
    change(saved, lambda tensors: tensors.update({MEMORY: tensor}))
    refused(saved, message)


def test_all_differences_are_listed(saved):
    def several(tensors):
        tensors[MEMORY] = torch.zeros(1)
        tensors["another"] = torch.zeros(1)
        for name in [name for name in tensors if "lora_A" in name]:
            del tensors[name]

    change(saved, several)
    refused(saved, r"(?s)lora_A.*missing.*'another' is unknown.*gradmem_memory' has shape")


def test_weights_that_are_not_safetensors_are_refused(saved):
    weights = saved / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(saved, "are damaged")
    torch.save({}, saved / "adapter_model.bin")  # never opened instead
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_checkpoint(saved, backbone=tiny())


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_an_incomplete_trained_backbone_is_refused(tmp_path, how):
    saved = tmp_path / "saved"
    save_checkpoint(get_peft_model(tiny(), GradMemConfig(train_backbone=True)), tiny_tokenizer(), saved)
    load_checkpoint(saved)
    (saved / "SHA256SUMS").unlink()
    weights = saved / "backbone" / "model.safetensors"
    if how == "missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises((ValueError, OSError), match=r"[Bb]ackbone .*(lacks 1 tensor, .*up_proj|cannot be opened)"):
        load_checkpoint(saved)


def test_damaged_headers_change_nothing_or_are_refused(saved):
    """The checkpoint either loads as it was saved, or is refused with a ValueError."""
    weights, dice = saved / WEIGHTS, random.Random(0)
    good = weights.read_bytes()
    whole = load_file(weights)
    end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(60):
        data = bytearray(good)
        data[dice.randrange(end)] = dice.randrange(256)
        weights.write_bytes(data)
        try:
            model, _ = load_checkpoint(saved, backbone=tiny())
        except ValueError:
            continue
        assert torch.equal(model.base_model.slots.gradmem_memory["default"], whole[MEMORY])


def test_other_files_beside_a_checkpoint_stay(saved):
    (saved / "checkpoint-500").mkdir()
    (saved / "checkpoint-500" / "optimizer.pt").write_bytes(b"state")
    (saved / "notes.md").write_text("what I found")
    (saved / "latest").symlink_to("checkpoint-500")
    (saved / "broken").symlink_to("nowhere")
    (saved / "backbone").mkdir()
    (saved / "backbone" / "notes.txt").write_text("mine")
    (saved / "vocab.txt").write_text("of my corpus")
    save_checkpoint(get_peft_model(tiny(), GradMemConfig(num_memory_tokens=5)), tiny_tokenizer(), saved)
    assert (saved / "checkpoint-500" / "optimizer.pt").read_bytes() == b"state"
    assert (saved / "notes.md").read_text() == "what I found"
    assert (saved / "latest").readlink().name == "checkpoint-500"
    assert (saved / "broken").is_symlink()
    assert (saved / "backbone" / "notes.txt").read_text() == "mine"
    assert (saved / "vocab.txt").read_text() == "of my corpus"
    model, _ = load_checkpoint(saved, backbone=tiny())
    assert model.active_peft_config.num_memory_tokens == 5


def test_a_directory_that_is_not_ours_is_not_replaced(saved):
    (saved / "backbone").mkdir()
    (saved / "backbone" / "notes.txt").write_text("mine")
    before = (saved / WEIGHTS).read_bytes()
    trained = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=5, train_backbone=True))
    with pytest.raises(FileExistsError, match="backbone' exists, but SHA256SUMS does not list it"):
        save_checkpoint(trained, tiny_tokenizer(), saved)
    assert (saved / "backbone" / "notes.txt").read_text() == "mine"
    assert (saved / WEIGHTS).read_bytes() == before


def test_an_adapter_of_another_kind_is_not_replaced(tmp_path):
    get_peft_model(tiny(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="is not a checkpoint of a GradMem adapter"):
        save_checkpoint(get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3)), tiny_tokenizer(), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
