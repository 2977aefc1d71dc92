"""Adapter configurations that would take forever or fill the memory soon give an error."""

import copy
import dataclasses
import json
import shutil

import pytest
from peft import PeftConfig, get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, load_checkpoint, save_checkpoint
from gradmem_adapter.utils.directory import SUMS

ENDLESS = "([a-z_.0-9]+)+!"
"""It matches no module name, but only after exponentially many attempts."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "saved"
    config = GradMemConfig(num_memory_tokens=3, lora_config={"r": 2, "target_modules": r".*(q_proj|v_proj)"})
    save_checkpoint(get_peft_model(tiny(), config), tiny_tokenizer(), folder)
    (folder / SUMS).unlink()  # an attacker would also make the digest
    return folder, json.loads((folder / "adapter_config.json").read_text())


def opened(made, **changes):
    folder, good = made
    lora = good["lora_config"] | {name: changes.pop(name) for name in list(changes) if name not in good}
    (folder / "adapter_config.json").write_text(json.dumps(good | {"lora_config": lora} | changes))
    return load_checkpoint(folder, backbone=tiny())


def test_a_sensible_expression_is_used(made):
    model, _ = opened(made)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4


@pytest.mark.parametrize(
    "field",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
    ids=lambda field: "-".join(field),
)
def test_an_expression_that_never_finishes_is_refused(made, monkeypatch, field):
    monkeypatch.setattr("gradmem_adapter.utils.patterns.SECONDS", 1)
    with pytest.raises(ValueError, match="regular expressions of lora_config did not finish within 1 s"):
        opened(made, **field)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, dataclasses.replace, lambda config: GradMemConfig(**config.to_dict())]
)
def test_expressions_from_a_file_are_tried_however_it_is_read(made, monkeypatch, named, copied):
    monkeypatch.setattr("gradmem_adapter.utils.patterns.SECONDS", 1)
    folder, good = made
    config = good | {"lora_config": {"r": 2, "target_modules": ENDLESS}}
    if not named:
        del config["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loaded = (PeftConfig if named else GradMemConfig).from_pretrained(str(folder))
    for config in (copied(loaded), GradMemConfig(lora_config=loaded.lora_config)):
        with pytest.raises(ValueError, match="regular expressions of lora_config did not finish within 1 s"):
            get_peft_model(tiny(), config)


@pytest.mark.parametrize("executable", [None, "", "no_such_file", "false", "true", "echo"])
def test_expressions_from_files_are_refused_if_python_cannot_start(made, monkeypatch, executable):
    """The user's own expressions and plain names need no Python process."""
    monkeypatch.setattr("sys.executable", (executable and shutil.which(executable)) or executable)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ChildProcessError, match=r"'.*\(q_proj\|v_proj\)'.*does not start Python. Set it to a Python"):
        opened(made)
    opened(made, target_modules=["q_proj", "v_proj"])
    get_peft_model(tiny(), GradMemConfig(lora_config={"r": 2, "target_modules": r".*(q_proj|v_proj)"}))


@pytest.mark.parametrize("pattern", ["(q_proj", "[", "*", "(" * 5000, "a{2,1}", r"\g"])
def test_invalid_expressions_are_refused(made, pattern):
    with pytest.raises(ValueError, match="lora_config cannot be used"):
        opened(made, target_modules=pattern)
    with pytest.raises(ValueError, match="lora_config cannot be used"):
        get_peft_model(tiny(), GradMemConfig(lora_config={"target_modules": pattern}))


@pytest.mark.parametrize(
    "field",
    [
        {"r": 10**9},
        {"r": 10**15},
        {"r": 2**70},
        {"r": -1},
        {"r": 0},
        {"r": "2"},
        {"r": 2.5},
        {"r": None},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {"q_proj": "x"}},
        {"rank_pattern": 7},
        {"alpha_pattern": [1]},
        {"target_modules": 5},
        {"target_modules": [None]},
        {"lora_dropout": "much"},
        {"lora_alpha": "x"},
        {"num_memory_tokens": 10**10},
        {"num_memory_tokens": 2**70},
        {"num_control_tokens": 10**10},
        {"memory_init": "vocab", "num_memory_tokens": 10**10},
        {"learn_write_lr": "per_element", "num_write_lrs": 10**10},
        {"num_memory_tokens": "3"},
        {"lora_config": 3},
        {"peft_type": "LORA"},
        {"peft_type": "NONE"},
        {"peft_type": None},
    ],
    ids=str,
)
def test_values_that_do_not_fit_the_tensors_are_refused(made, field):
    (name,) = {"num_memory_tokens", "num_control_tokens", "peft_type"}.intersection(field) or {"lora_config"}
    known = f"{name}|`r` should be a positive integer|saved' does not match the model|KeyError|a LORA adapter"
    with pytest.raises(ValueError, match=known):
        opened(made, **field)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "\x00", '{"a": 1'], ids=lambda t: t[:9])
def test_invalid_configuration_files_are_refused(made, text):
    (made[0] / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the configuration of the adapter in '.*saved' cannot be opened"):
        load_checkpoint(made[0], backbone=tiny())
