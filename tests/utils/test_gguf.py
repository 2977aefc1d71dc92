"""GGUF files inside packages: dequantised once, cached, and rebuilt if the cache is damaged."""

import shutil
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gradmem_adapter.backbones import SMOLLM2, load_backbone
from gradmem_adapter.utils import gguf, temporary


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in state.items())


class TestCache:
    """The cache of dequantised backbones, with a tiny model in place of the content of a GGUF file."""

    reference = "package:holds_a_model/tiny.gguf"

    @pytest.fixture(autouse=True)
    def package(self, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "site" / "holds_a_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        (package / "tiny.gguf").write_bytes(b"weights")
        monkeypatch.syspath_prepend(str(package.parent))
        self.gguf, self.made, self.cache = package / "tiny.gguf", 0, tmp_path / "cache" / "gradmem"
        self.weights = AutoModelForCausalLM.from_pretrained(llama_directory).state_dict()

        def dequantise(_: Path, target: Path) -> Path:
            self.made += 1
            return Path(shutil.copytree(llama_directory, target))

        monkeypatch.setattr(gguf, "_dequantise", dequantise)
        monkeypatch.delenv("GRADMEM_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache.parent))

    def open(self) -> PreTrainedModel:
        model, tokenizer = load_backbone(self.reference)
        assert same(model, self.weights)
        assert model.name_or_path == tokenizer.name_or_path == self.reference
        assert not list(self.cache.glob(".*"))  # nothing temporary is left behind
        return model

    def test_the_second_load_comes_from_the_cache(self) -> None:
        self.open()
        self.open()
        assert self.made == 1
        self.gguf.write_bytes(b"other weights")
        self.open()
        assert self.made == 2 == len(list(self.cache.iterdir()))

    def test_an_environment_variable_moves_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "elsewhere"))
        self.open()
        assert len(list((tmp_path / "elsewhere").iterdir())) == 1
        assert not self.cache.exists()

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
    @pytest.mark.parametrize("damage", ["truncated", "missing"])
    def test_a_damaged_cache_is_repaired(self, file: str, damage: str) -> None:
        self.open()
        (entry,) = self.cache.iterdir()
        content = (entry / file).read_bytes()
        (entry / file).unlink()
        if damage == "truncated":
            (entry / file).write_bytes(content[: len(content) // 2])
        with pytest.warns(UserWarning, match="is damaged and will be rebuilt"):
            self.open()
        self.open()
        assert self.made == 2

    def test_a_missing_tensor_counts_as_damage(self) -> None:
        self.open()
        (entry,) = self.cache.iterdir()
        tensors = load_file(entry / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, entry / "model.safetensors", metadata={"format": "pt"})
        with pytest.warns(UserWarning, match=r"is damaged and will be rebuilt .*model.norm.weight"):
            self.open()

    def test_an_unwritable_cache_gives_a_warning(self) -> None:
        self.cache.parent.touch()  # a file in its way
        with pytest.warns(UserWarning, match="could not be cached"):
            self.open()

    def test_a_second_process_waits_for_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make, opened = gguf._dequantise, []
        second = threading.Thread(target=lambda: opened.append(load_backbone(self.reference)[0]))

        def slow(file: Path, target: Path) -> Path:
            if not second.ident:
                second.start()
                second.join(0.2)
            return make(file, target)

        monkeypatch.setattr(gguf, "_dequantise", slow)
        load_backbone(self.reference)
        second.join()
        assert same(opened[0], self.weights)
        assert self.made == 1

    def test_another_process_repairs_the_cache_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open()
        (entry,) = self.cache.iterdir()
        (entry / "config.json").unlink()
        wait = gguf.locked

        def overtaken(folder: Path) -> AbstractContextManager[None]:
            monkeypatch.setattr(gguf, "locked", wait)
            with pytest.warns(UserWarning, match="is damaged and will be rebuilt"):
                load_backbone(self.reference)
            return wait(folder)

        monkeypatch.setattr(gguf, "locked", overtaken)
        self.open()
        assert self.made == 2

    def test_another_process_finishes_first_without_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make = gguf._dequantise

        def overtaken(file: Path, target: Path) -> Path:
            monkeypatch.setattr(gguf, "_dequantise", make)
            load_backbone(self.reference)
            return make(file, target)

        monkeypatch.setattr(gguf, "_dequantise", overtaken)
        monkeypatch.setattr(temporary, "fcntl", None)
        assert same(load_backbone(self.reference)[0], self.weights)
        assert self.made == 2
        assert len(list(self.cache.iterdir())) == 1


def test_special_tokens_come_from_the_config() -> None:
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None  # as Transformers 5.17 reads a GGUF file
    gguf._mark_special_tokens(tokenizer, LlamaConfig(**{f"{name}_id": index for name, index in ids.items()}))
    assert {name: getattr(tokenizer, f"{name}_id") for name in ids} == ids
    gguf._mark_special_tokens(tokenizer, LlamaConfig(bos_token_id=None, eos_token_id=[2, 3], pad_token_id=None))
    assert {name: getattr(tokenizer, f"{name}_id") for name in ids} == ids  # a config that names none changes nothing


@pytest.mark.smollm
def test_smollm2_is_loaded_from_its_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(gguf, "_dequantise", None)  # the second load does not need it
    again, words = load_backbone(SMOLLM2)
    assert same(again, model.state_dict())
    assert again.config.to_dict() == model.config.to_dict()
    assert words("In 1931:\n  née Vasko") == tokenizer("In 1931:\n  née Vasko")
