"""Checkpoints are restored bit for bit, are complete or absent, and their errors say what to do."""

import json
import os
import shutil
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gradmem_adapter import GradMemConfig, checkpoint
from gradmem_adapter.checkpoint import load_checkpoint, save_checkpoint
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.utils import snapshot
from gradmem_adapter.utils.parameters import backbone_parameters

LORA = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
DORA = LORA | {"use_dora": True}
BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]}
BD_LORA = LORA | {"target_modules": ["q_proj", "v_proj"], "use_bdlora": BLOCKS}
ON_EMBEDDINGS = LORA | {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}


@pytest.fixture
def backbone(tmp_path):
    return save_backbone(tmp_path / "base")


def save_backbone(path, architecture="llama", tokenizer=True):
    tiny(architecture).save_pretrained(path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return str(path)


def make(reference, dtype=torch.float32, **config):
    """An adapter with every tensor the method has, on the backbone in a directory."""
    backbone = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype)
    defaults = {
        "num_memory_tokens": 3, "write_lr": 0.3, "memory_init_std": 0.5, "num_control_tokens": 1,
        "memory_projection": "shared", "write_head": True, "learn_write_lr": "scalar",
    }  # fmt: skip
    return train(get_peft_model(backbone, GradMemConfig(**defaults | config)).eval())


def train(model):
    """Changes every trainable tensor, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def outcome(model, tokenizer):
    pipeline = GradMemPipeline(model, tokenizer)
    state = pipeline.write([tiny_text(9), tiny_text(5, 1)])
    texts = pipeline.generate([tiny_text(3, 2), tiny_text(5, 3)], memory=state, max_new_tokens=8, do_sample=False)
    return state.to_bytes(), texts


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


class TestRoundTrip:
    @pytest.mark.parametrize(
        "lora", [None, LORA, DORA, BD_LORA, ON_EMBEDDINGS], ids=["alone", "lora", "dora", "bd-lora", "on embeddings"]
    )
    def test_an_adapter_on_a_frozen_backbone(self, backbone, tmp_path, lora):
        model, tokenizer = train(make(backbone, lora_config=lora)), tiny_tokenizer()
        save_checkpoint(model, tokenizer, tmp_path / "saved")
        assert not (tmp_path / "saved" / "backbone").exists()
        assert "adapter_model.safetensors" in files(tmp_path / "saved")
        assert not any("model-0" in name or name == "model.safetensors" for name in files(tmp_path / "saved"))
        loaded, words = load_checkpoint(tmp_path / "saved")
        assert same(loaded, model)
        assert outcome(loaded, words) == outcome(model, tokenizer)
        assert loaded.fingerprint() == model.fingerprint()
        assert not loaded.training
        assert loaded.get_base_model().name_or_path == backbone

    @pytest.mark.parametrize("lora", [None, LORA], ids=["alone", "lora"])
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # tied and untied
    def test_an_adapter_with_its_trained_backbone(self, tmp_path, architecture, lora):
        reference = save_backbone(tmp_path / "base", architecture)
        model, tokenizer = train(make(reference, train_backbone=True, lora_config=lora)), tiny_tokenizer()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_checkpoint(model, tokenizer, tmp_path / "saved")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        shutil.rmtree(reference)  # no longer needed
        loaded, words = load_checkpoint(str(tmp_path / "saved"))
        assert same(loaded, model)
        assert outcome(loaded, words) == outcome(model, tokenizer)

        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "backbone", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        trained = dict(backbone_parameters(model.get_base_model()))
        assert trained.keys() == dict(plain.named_parameters()).keys()
        assert all(torch.equal(parameter, trained[name]) for name, parameter in plain.named_parameters())
        assert not same(plain, tiny(architecture))
        ids = torch.tensor([[5, 6, 7]])
        if lora is None:
            assert torch.equal(plain(ids).logits, model(input_ids=ids).logits)

        save_checkpoint(loaded, words, tmp_path / "again")  # and once more
        assert outcome(*load_checkpoint(tmp_path / "again")) == outcome(model, tokenizer)

    @pytest.mark.parametrize("lora", [None, LORA], ids=["alone", "lora"])
    def test_checkpoints_open_in_inference_mode(self, backbone, tmp_path, lora):
        """As in a script that runs entirely in it; also if PEFT opens the adapter."""
        model, tokenizer = train(make(backbone, lora_config=lora)), tiny_tokenizer()
        save_checkpoint(model, tokenizer, tmp_path / "saved")
        expected = outcome(model, tokenizer)
        with torch.inference_mode():
            assert outcome(*load_checkpoint(tmp_path / "saved")) == expected
            opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "saved")
            assert outcome(opened, tokenizer) == expected

    def test_the_query_format_is_kept(self, backbone, tmp_path):
        model = make(backbone, query_format="Question : {query} :")
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        assert GradMemPipeline(*load_checkpoint(tmp_path / "saved")).format_query("w1")[0] == "Question : w1 :"

    def test_the_tokenizer_is_kept(self, backbone, tmp_path):
        save_checkpoint(make(backbone), tiny_tokenizer(bos=True, chat_template="{{ messages }}"), tmp_path / "saved")
        _, words = load_checkpoint(tmp_path / "saved")
        assert words.chat_template == "{{ messages }}"
        assert words("w1")["input_ids"] == tiny_tokenizer(bos=True)("w1")["input_ids"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_dtype_applies_to_the_backbone_only(self, backbone, tmp_path, dtype):
        """What was trained beside it is not rounded."""
        model = make(backbone, dtype=dtype, lora_config=LORA)
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        loaded, words = load_checkpoint(tmp_path / "saved", dtype=dtype, is_trainable=True)
        assert loaded.get_base_model().lm_head.weight.dtype == dtype
        trained = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.promote_types(dtype, torch.float32)}
        assert same(loaded, model)
        assert loaded.fingerprint() == model.fingerprint()
        assert outcome(loaded, words) == outcome(model, tiny_tokenizer())

    @pytest.mark.parametrize("train_backbone", [False, True])
    def test_is_trainable_decides_what_can_be_trained(self, backbone, tmp_path, train_backbone):
        model = make(backbone, train_backbone=train_backbone)
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for is_trainable in (False, True):
            loaded, _ = load_checkpoint(tmp_path / "saved", is_trainable=is_trainable)
            trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
            assert trainable == (wanted if is_trainable else set())


class TestBackbone:
    def test_another_backbone_can_be_passed(self, backbone, tmp_path):
        model, tokenizer = make(backbone), tiny_tokenizer()
        save_checkpoint(model, tokenizer, tmp_path / "saved")
        moved = (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="There is no directory"):
            load_checkpoint(tmp_path / "saved")
        for override in (AutoModelForCausalLM.from_pretrained(moved), str(moved), moved):
            loaded, words = load_checkpoint(tmp_path / "saved", backbone=override)
            assert outcome(loaded, words) == outcome(model, tokenizer)

    @pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device": "cpu"}])
    def test_dtype_and_device_are_refused_with_a_passed_model(self, backbone, tmp_path, options):
        save_checkpoint(make(backbone), tiny_tokenizer(), tmp_path / "saved")
        with pytest.raises(ValueError, match=r"but backbone is a model. Move it yourself with backbone\.to"):
            load_checkpoint(tmp_path / "saved", backbone=tiny(), **options)

    def test_a_passed_backbone_replaces_a_trained_one(self, backbone, tmp_path):
        model = train(make(backbone, train_backbone=True))
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        loaded, _ = load_checkpoint(tmp_path / "saved", backbone=backbone)
        assert torch.equal(loaded.get_base_model().lm_head.weight, tiny().lm_head.weight)
        assert not torch.equal(loaded.get_base_model().lm_head.weight, model.get_base_model().lm_head.weight)

    def test_a_backbone_without_a_name_must_be_passed(self, tmp_path):
        model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2)).eval()
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        with pytest.raises(ValueError, match="does not name its backbone"):
            load_checkpoint(tmp_path / "saved")
        loaded, words = load_checkpoint(tmp_path / "saved", backbone=tiny())
        assert outcome(loaded, words) == outcome(model, tiny_tokenizer())

    def test_another_model_is_told_which_backbone_the_adapter_was_made_for(self, backbone, tmp_path):
        save_checkpoint(make(backbone), tiny_tokenizer(), tmp_path / "saved")
        with pytest.raises(ValueError, match=f"made for '{backbone}'; for another model, train one"):
            load_checkpoint(tmp_path / "saved", backbone=tiny(hidden_size=16))

    def test_the_tokenizer_may_be_in_the_checkpoint_only(self, tmp_path):
        model = make(save_backbone(tmp_path / "base", tokenizer=False))
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        loaded, words = load_checkpoint(tmp_path / "saved")
        assert outcome(loaded, words) == outcome(model, tiny_tokenizer())

    def test_the_tokenizer_may_be_in_the_backbone_only(self, backbone, tmp_path):
        model = make(backbone)
        model.save_pretrained(tmp_path / "saved")  # PEFT's own, without a tokenizer
        loaded, words = load_checkpoint(tmp_path / "saved")
        assert outcome(loaded, words) == outcome(model, tiny_tokenizer())
        with pytest.raises(ValueError, match="There is no tokenizer in"):
            load_checkpoint(tmp_path / "saved", backbone=tiny())

    def test_peft_opens_a_checkpoint(self, backbone, tmp_path):
        model = make(backbone)
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "saved").eval()
        assert outcome(loaded, tiny_tokenizer()) == outcome(model, tiny_tokenizer())

    @pytest.mark.parametrize("train_backbone", [False, True])
    def test_save_pretrained_warns_that_it_omits_a_trained_backbone(self, backbone, tmp_path, train_backbone):
        """Its training was once lost without a warning."""
        model = make(backbone, train_backbone=train_backbone)
        with warnings.catch_warnings(record=True) as told:
            save_checkpoint(model, tiny_tokenizer(), tmp_path / "whole")
            model.save_pretrained(tmp_path / "alone")
        said = [str(warning.message) for warning in told if "save_pretrained saves only the adapter" in str(warning)]
        assert len(said) == train_backbone

    def test_opening_by_peft_warns_of_a_trained_backbone(self, backbone, tmp_path):
        """PEFT does not know backbones inside checkpoints, and puts the adapter on the untrained one."""
        model, path = make(backbone, train_backbone=True), tmp_path / "saved"
        save_checkpoint(model, tiny_tokenizer(), path)
        assert "PEFT alone opens it" not in (path / "README.md").read_text()
        with pytest.warns(
            UserWarning, match=r"trained together with its backbone, but '.*base' is that backbone before training"
        ):
            AutoPeftModelForCausalLM.from_pretrained(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load_checkpoint(path)
            opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path / "backbone"), path)
            model.load_adapter(str(path), "again")  # on the trained backbone itself
        assert opened.fingerprint() == model.fingerprint()


class TestWhole:
    def test_a_save_replaces_an_earlier_checkpoint(self, backbone, tmp_path):
        path = tmp_path / "new folder" / "saved"
        save_checkpoint(make(backbone, train_backbone=True), tiny_tokenizer(), path)
        model = make(backbone)
        save_checkpoint(model, tiny_tokenizer(), path)
        assert not (path / "backbone").exists()
        assert outcome(*load_checkpoint(path)) == outcome(model, tiny_tokenizer())
        assert [entry.name for entry in path.parent.iterdir()] == ["saved"]

    @pytest.mark.parametrize("where", ["tokenizer", "backbone", "rename"])
    def test_a_failed_save_leaves_the_earlier_checkpoint(self, backbone, tmp_path, monkeypatch, where):
        path = tmp_path / "checkpoints" / "saved"
        model, tokenizer = make(backbone), tiny_tokenizer()
        save_checkpoint(model, tokenizer, path)
        content = {name: (path / name).read_bytes() for name in files(path)}

        def fail(*_, **__):
            raise OSError("no space left on device")

        other = train(make(backbone, train_backbone=True))
        if where == "tokenizer":
            monkeypatch.setattr(tokenizer, "save_pretrained", fail)
        elif where == "backbone":
            monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        else:
            rename = checkpoint.Path.rename
            monkeypatch.setattr(
                checkpoint.Path, "rename", lambda self, to: fail() if self.name == "new" else rename(self, to)
            )
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(other, tokenizer, path)
        monkeypatch.undo()
        assert {name: (path / name).read_bytes() for name in files(path)} == content
        assert [entry.name for entry in path.parent.iterdir()] == ["saved"]
        assert outcome(*load_checkpoint(path)) == outcome(model, tiny_tokenizer())

    def test_a_failed_first_save_leaves_nothing(self, backbone, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise OSError("no space left on device")

        tokenizer = tiny_tokenizer()
        monkeypatch.setattr(tokenizer, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(make(backbone), tokenizer, tmp_path / "checkpoints" / "saved")
        assert list((tmp_path / "checkpoints").iterdir()) == []


class TestErrors:
    def test_a_missing_path(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"There is no checkpoint .*not a shipped checkpoint \(kv-.*smollm2-135m-qa"
        ):
            load_checkpoint(tmp_path / "none")

    def test_an_unreachable_hub(self, monkeypatch):
        def unreachable(*_, **__):
            raise OSError("cannot connect")

        monkeypatch.setattr(snapshot, "_downloaded", unreachable)
        with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'someone/adapter'.*cannot connect"):
            load_checkpoint("someone/adapter")

    @pytest.mark.parametrize("device", ["abacus", "cuda:99", torch.device("xla")])
    def test_an_unknown_device(self, backbone, tmp_path, device):
        save_checkpoint(make(backbone), tiny_tokenizer(), tmp_path / "saved")
        with pytest.raises(ValueError, match=rf"There is no device '{device}' on this machine; use cpu"):
            load_checkpoint(tmp_path / "saved", device=device)

    def test_another_kind_of_adapter(self, tmp_path):
        get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match="holds a LORA adapter, not a GradMem adapter"):
            load_checkpoint(tmp_path / "lora")

    def test_a_directory_without_an_adapter(self, backbone):
        with pytest.raises(ValueError, match=r"no adapter_config\.json. It is a model .* Train one .*--backbone"):
            load_checkpoint(backbone)

    def test_a_directory_above_an_adapter(self, backbone, tmp_path):
        save_checkpoint(make(backbone), tiny_tokenizer(), tmp_path / "run" / "checkpoint")
        with pytest.raises(ValueError, match=r"run' is not a checkpoint.*There is one in '.*run.checkpoint'\."):
            load_checkpoint(tmp_path / "run")
        with pytest.raises(ValueError, match=r"is not a checkpoint: .*by save_checkpoint"):
            load_checkpoint(tmp_path)

    def test_the_configuration_is_json(self, backbone, tmp_path):
        save_checkpoint(make(backbone, lora_config=LORA), tiny_tokenizer(), tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert config["peft_type"] == "GRADMEM"
        assert config["base_model_name_or_path"] == backbone

    def test_the_path_of_a_backbone_is_normalised(self, backbone, tmp_path):
        (tmp_path / "here").mkdir()
        there = tmp_path / "here" / ".." / os.path.relpath(backbone, tmp_path)
        save_checkpoint(make(str(there)), tiny_tokenizer(), tmp_path / "saved")
        (tmp_path / "here").rmdir()
        load_checkpoint(tmp_path / "saved")
        assert (
            json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == backbone
        )


def test_the_active_adapter_is_saved_whatever_its_name(backbone, tmp_path):
    model = make(backbone)
    model.add_adapter("other", GradMemConfig(num_memory_tokens=2, write_lr=0.3))
    model.set_adapter("other")
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
    assert outcome(*load_checkpoint(tmp_path / "saved")) == outcome(model, tiny_tokenizer())
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_directory_that_is_not_a_checkpoint_is_not_replaced(backbone, tmp_path):
    folder = tmp_path / "trainer output"
    (folder / "checkpoint-10").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not a checkpoint of a GradMem adapter"):
        save_checkpoint(make(backbone), tiny_tokenizer(), folder)
    assert [entry.name for entry in folder.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize("lora", [None, ON_EMBEDDINGS], ids=["alone", "lora on embeddings"])
@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_saved_and_restored(tmp_path, tied, lora):
    """The referenced backbone does not have them."""
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    backbone, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny_tokenizer()
    tokenizer.add_tokens(["<note>"])
    backbone.resize_token_embeddings(len(tokenizer))
    config = GradMemConfig(num_memory_tokens=3, write_head=True, lora_config=lora)
    model = train(get_peft_model(backbone, config).eval())
    inputs = tokenizer("w1 <note> w2", return_tensors="pt")
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    opened, tokenizer = load_checkpoint(tmp_path / "checkpoint")
    assert len(opened.get_input_embeddings().weight) == len(tokenizer)
    assert opened.write(**tokenizer("w1 <note> w2", return_tensors="pt")).equal(model.write(**inputs))
