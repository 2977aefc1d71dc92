"""Code that comes with a checkpoint or backbone is neither run nor asked about."""

import json

import pytest
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, load_backbone, load_checkpoint, save_checkpoint

CODE = "raise SystemExit('code of a checkpoint was run')\n"


def infect(folder, file, auto_map):
    content = json.loads((folder / file).read_text())
    content |= {"auto_map": auto_map, "model_type": "foreign", "tokenizer_class": "ForeignTokenizer"}
    (folder / file).write_text(json.dumps(content))
    (folder / "foreign.py").write_text(CODE)


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    monkeypatch.setattr("signal.alarm", lambda *_: pytest.fail("the user was asked, with a time limit"))


def test_a_backbone_with_code_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    infect(tmp_path, "config.json", {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"})
    with pytest.raises(ValueError, match="cannot be opened"):
        load_backbone(str(tmp_path))


def test_a_tokenizer_with_code_is_refused(tmp_path):
    save_checkpoint(get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2)), tiny_tokenizer(), tmp_path / "saved")
    infect(tmp_path / "saved", "tokenizer_config.json", {"AutoTokenizer": ["foreign.Tokenizer", None]})
    with pytest.raises(ValueError, match="code"):
        load_checkpoint(tmp_path / "saved", backbone=tiny())
