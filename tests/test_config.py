"""The configuration: round trips, help, and values that are refused."""

import dataclasses
import inspect
import json
import re

import pytest
from peft import LoraConfig, PeftConfig

from gradmem_adapter import GradMemConfig
from gradmem_adapter.config import is_from_file


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", {"k_proj"}])
def test_the_configuration_survives_a_round_trip(tmp_path, targets):
    config = GradMemConfig(num_memory_tokens=5, lora_config={"r": 3, "target_modules": targets}, query_format="chat")
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, GradMemConfig)
    assert isinstance(again.lora_config, LoraConfig)
    assert again.to_dict() == config.to_dict()


def test_the_docstring_explains_every_field_with_its_default():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(GradMemConfig) if field.name not in inherited]
    assert len(own) <= 25
    explained = inspect.getdoc(GradMemConfig)  # Python 3.13 strips the indentation by itself
    for field in own:
        default = "" if field.default is None else f", defaults to `{json.dumps(field.default).capitalize()}`"
        if isinstance(field.default, str):
            default = f', defaults to `"{field.default}"`'
        assert re.search(rf"^    {field.name} \(`[^)]+\*optional\*{re.escape(default)}\): \S", explained, re.M), (
            field.name
        )
    documented = re.findall(r"^    (\w+) \(`", explained, re.M)
    assert documented == [field.name for field in own]


def test_the_signature_lists_the_fields():
    names = [field.name for field in dataclasses.fields(GradMemConfig)]
    assert list(inspect.signature(GradMemConfig).parameters) == names


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"task_type": "SEQ_CLS"}, ValueError),
        ({"task_type": None}, ValueError),
        ({"num_memory_tokens": 0}, ValueError),
        ({"num_memory_tokens": 2.0}, TypeError),
        ({"num_memory_tokens": True}, TypeError),
        ({"write_steps": -1}, ValueError),
        ({"num_control_tokens": -1}, ValueError),
        ({"second_order_steps": -1}, ValueError),
        ({"write_lr": 0}, ValueError),
        ({"write_lr": float("nan")}, ValueError),
        ({"write_lr": "1"}, TypeError),
        ({"memory_init_std": -0.1}, ValueError),
        ({"reconstruction_weight": -1.0}, ValueError),
        ({"write_clip_norm": 0.0}, ValueError),
        ({"start": "sum"}, ValueError),
        ({"start": True}, ValueError),
        ({"trained_length": 0}, ValueError),
        ({"trained_length": 8.0}, TypeError),
        ({"learn_write_lr": True}, ValueError),
        ({"num_write_lrs": 0, "learn_write_lr": "scalar"}, ValueError),
        ({"num_write_lrs": 2}, ValueError),
        ({"write_head": "yes"}, TypeError),
        ({"train_backbone": None}, TypeError),
        ({"write_head": 0}, TypeError),
        ({"write_optimizer": "lion"}, ValueError),
        ({"meta_gradient": "second"}, ValueError),
        ({"memory_projection": "proj"}, ValueError),
        ({"lora_phase": "never"}, ValueError),
        ({"memory_init": "zeros"}, ValueError),
        ({"query_format": "Q: "}, ValueError),
        ({"meta_gradient": "none", "reconstruction_weight": 0.1}, ValueError),
        ({"lora_config": 3}, TypeError),
        ({"lora_config": {"bias": "all"}}, ValueError),
        ({"lora_config": {"modules_to_save": ["lm_head"]}}, ValueError),
        ({"lora_config": {"init_lora_weights": "pissa"}}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        GradMemConfig(**fields)


VARIANTS = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]


@pytest.mark.parametrize("name", sorted({*VARIANTS} - {"use_dora", "use_bdlora"}))
def test_a_variant_of_lora_that_does_not_work_is_refused(name):
    """KaSA rewrites the backbone's weights, aLoRA never acts after embeddings, others reload differently."""
    lora = LoraConfig(r=2)
    setattr(lora, name, True)
    with pytest.raises(ValueError, match=f"lora_config may not use {name}: of PEFT's variants"):
        GradMemConfig(lora_config=lora)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match=r"has no field num_memory_token\. Did you mean num_memory_tokens\?") as raised:
        GradMemConfig(num_memory_token=3)
    assert len(str(raised.value)) < 400, "thirty names help nobody"


@pytest.mark.parametrize("cls", [PeftConfig, GradMemConfig])
def test_unknown_fields_of_a_saved_file_are_left_out_with_a_warning(tmp_path, cls):
    """As PEFT's own methods do: a newer `PeftConfig`, which knows nothing of GradMem, may have added them."""
    config = GradMemConfig(num_memory_tokens=3, lora_config={"r": 3})
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    newer = saved | {"field_of_next_year": None, "lora_config": saved["lora_config"] | {"and_its": 1}}
    file.write_text(json.dumps(newer))
    with pytest.warns(UserWarning, match="was saved with the fields") as told:
        assert cls.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert [str(warning.message).partition(", which")[0] for warning in told] == [
        "GradMemConfig was saved with the fields field_of_next_year", "lora_config was saved with the fields and_its",
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [PeftConfig, GradMemConfig])
def test_only_a_lora_from_a_file_is_marked(tmp_path, cls):
    """A regular expression from a file is tried in a separate process; one from the user's own code is not."""
    config = GradMemConfig(lora_config=LoraConfig(target_modules="q_.*"))
    assert not is_from_file(dataclasses.replace(config, write_steps=3).lora_config)
    assert not is_from_file(config.lora_config)
    config.save_pretrained(tmp_path)
    saved = cls.from_pretrained(tmp_path)
    assert is_from_file(saved.lora_config)
    assert is_from_file(dataclasses.replace(saved, write_steps=3).lora_config)


def test_unknown_fields_of_a_saved_lora_are_left_out_with_a_warning():
    saved = GradMemConfig(lora_config={"r": 3, "target_modules": "all-linear"}).to_dict()
    newer = saved["lora_config"] | {"field_of_next_year": None}
    with pytest.warns(UserWarning, match="field_of_next_year"):
        assert GradMemConfig(lora_config=newer).to_dict() == saved
    with pytest.raises(TypeError, match="lora_config has no field rank"):
        GradMemConfig(lora_config={"rank": 3})
