"""A well-behaved PEFT method: registration, several adapters, disabling, unloading, phases, status, wrong models."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import re

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import gradmem_adapter
from gradmem_adapter import GradMemConfig, registration

IDS = tokens(2, 9)


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | options)


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config)).eval()


# -------------------------------------------------------------------- registration and configuration


def test_registration_may_be_repeated():
    members = list(PeftType)
    gradmem_adapter.register()
    importlib.reload(registration).register()
    assert list(PeftType) == members
    assert members.count("GRADMEM") == 1


def test_the_member_is_like_pefts_own():
    member = PeftType.GRADMEM
    assert member == "GRADMEM" == PeftType("GRADMEM") == PeftType["GRADMEM"]
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.loads(json.dumps(member)) == "GRADMEM"
    assert isinstance(member, PeftType)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", {"k_proj"}])
def test_config_round_trip(tmp_path, targets):
    config = GradMemConfig(num_memory_tokens=5, lora_config={"r": 3, "target_modules": targets}, query_format="chat")
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, GradMemConfig)
    assert isinstance(again.lora_config, LoraConfig)
    assert again.to_dict() == config.to_dict()


def test_help_explains_every_field_with_its_default():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(GradMemConfig) if field.name not in inherited]
    assert len(own) <= 24
    for field in own:
        default = "" if field.default is None else f", defaults to `{json.dumps(field.default).capitalize()}`"
        if isinstance(field.default, str):
            default = f', defaults to `"{field.default}"`'
        assert re.search(
            rf"^        {field.name} \(`[^)]+\*optional\*{re.escape(default)}\): \S", GradMemConfig.__doc__, re.M
        ), field.name
    documented = re.findall(r"^        (\w+) \(`", GradMemConfig.__doc__, re.M)
    assert documented == [field.name for field in own]


def test_the_signature_says_the_fields():
    assert list(inspect.signature(GradMemConfig).parameters) == [f.name for f in dataclasses.fields(GradMemConfig)]


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
        ({"write_lr_from_end": True}, ValueError),
        ({"write_head": "yes"}, TypeError),
        ({"train_backbone": None}, TypeError),
        ({"init_weights": 0}, TypeError),
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


def test_an_unknown_field_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"has no field memory_slots.*The fields are .*num_memory_tokens"):
        GradMemConfig(memory_slots=3)
    GradMemConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"start_from_context": False}))
    for cls in (PeftConfig, GradMemConfig):
        with pytest.raises(TypeError, match=r"has no field start_from_context.*rename or remove"):
            cls.from_pretrained(tmp_path)


# -------------------------------------------------------------------- models that cannot have a memory


@pytest.mark.parametrize("kind", ["encoder-decoder", "masked", "not a decoder", "headless", "no transformer"])
def test_what_is_no_causal_lm_is_refused(kind):
    bert = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model, message = {
        "encoder-decoder": lambda: (
            T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        "masked": lambda: (BertForMaskedLM(bert), "BertForMaskedLM"),
        "not a decoder": lambda: (BertLMHeadModel(bert), "both directions"),
        "headless": lambda: (LlamaModel(tiny().config), "no language-model head"),
        "no transformer": lambda: (nn.Sequential(nn.Linear(2, 2)), "causal language model of Transformers"),
    }[kind]()
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, GradMemConfig())


# -------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("first", [None, lora()])
@pytest.mark.parametrize("second", [None, lora(r=3)])
def test_switching_and_deleting(first, second):
    model = make(lora_config=copy.deepcopy(first))
    a = model.write(IDS)
    config = GradMemConfig(num_memory_tokens=4, write_lr=0.3, lora_config=copy.deepcopy(second), memory_init_std=0.5)
    model.add_adapter("other", config)
    assert model.write(IDS).equal(a)  # the new one is not active yet
    model.set_adapter("other")
    b = model.write(IDS)
    assert b.num_memory_tokens == 4
    assert b.fingerprint != a.fingerprint
    with pytest.raises(ValueError, match=f"written by model {a.fingerprint}, and this is model {b.fingerprint}"):
        model(input_ids=IDS, memory=a)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".other" in name for name in trainable)
    model.set_adapter("default")
    assert model.write(IDS).equal(a)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters) == (True, ["default"])
    assert status.peft_types == {"default": "GRADMEM", "other": "GRADMEM"}
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert model.write(IDS).equal(b)
    model.add_adapter("third", GradMemConfig(num_memory_tokens=2))
    model.delete_adapter("third")  # one that is not active
    assert model.write(IDS).equal(b)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("with_lora", [False, True])
def test_disabled_or_unloaded_is_the_backbone(architecture, with_lora):
    backbone = tiny(architecture)
    model = make(architecture, lora_config=lora() if with_lora else None)
    state = model.write(IDS)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected, text = backbone(IDS).logits, backbone.generate(IDS, **options)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(model.generate(IDS, **options), text)
        with pytest.raises(ValueError, match="adapter is disabled"):
            model(input_ids=IDS, memory=state)
        with pytest.raises(ValueError, match="adapter is disabled"):
            model.write(IDS)
    assert model.write(IDS).equal(state)
    unloaded = model.unload()
    assert torch.equal(unloaded(IDS).logits, expected)
    assert {name for name, _ in unloaded.named_modules()} == {name for name, _ in backbone.named_modules()}
    assert not hasattr(unloaded, "peft_config")
    assert unloaded.state_dict().keys() == backbone.state_dict().keys()


def test_merging_is_refused():
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        make().merge_and_unload()


def test_trainable_parameters_are_counted(capsys):
    model = make(memory_projection="shared", num_control_tokens=2, learn_write_lr="scalar")
    assert model.get_nb_trainable_parameters()[0] == 3 * 32 + 32 * 32 + 32 + 4 * 2 * 32 + 1
    model.print_trainable_parameters()
    assert "trainable params: 1,409" in capsys.readouterr().out


def test_only_what_is_asked_for_is_trainable():
    frozen = make(lora_config=lora())
    for name, parameter in frozen.named_parameters():
        assert parameter.requires_grad == ("gradmem_" in name or "lora_" in name), name
    full = make(lora_config=lora(), train_backbone=True)
    assert all(parameter.requires_grad for parameter in full.parameters())
    full.add_adapter("other", GradMemConfig(num_memory_tokens=2))
    full.set_adapter("other")
    assert [name for name, p in full.named_parameters() if p.requires_grad] == [
        "base_model.model.memory_slots.gradmem_memory.other"
    ]
    full.set_adapter("default")
    assert all(p.requires_grad for name, p in full.named_parameters() if "other" not in name)


@pytest.mark.parametrize("phase", ["both", "write", "read"])
def test_lora_acts_in_its_phase_alone(phase):
    model, plain = make(lora_config=lora(), lora_phase=phase), make()
    slots = plain.base_model.slots.gradmem_memory["default"]
    with torch.no_grad():
        slots.copy_(model.base_model.slots.gradmem_memory["default"])
    for each in (model, copy.deepcopy(model)):
        state, without = each.write(IDS), plain.write(IDS)
        assert torch.equal(state.vectors, without.vectors) == (phase == "read")
        read = [each(input_ids=IDS, memory=without, strict=False).logits, plain(input_ids=IDS, memory=without).logits]
        assert torch.equal(*read) == (phase == "write")
        assert each.get_model_status().enabled is True


def test_half_precision_backbone():
    model = get_peft_model(tiny().bfloat16(), GradMemConfig(num_memory_tokens=3, write_head=True)).eval()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "gradmem_" in name else torch.bfloat16), name
    assert model.generate(IDS, memory=model.write(IDS), max_new_tokens=2).shape == (2, 11)
    model.to(torch.float64)
    assert model.write(IDS).dtype == torch.float64


# -------------------------------------------------------------------- fingerprint


def test_fingerprint_follows_every_weight_that_matters():
    model = make(lora_config=lora(), train_backbone=True, write_head=True)
    seen = {model.fingerprint()}
    for name, parameter in model.named_parameters():
        if "layers.1" in name or "gradmem" in name:
            with torch.no_grad():
                parameter.flatten()[0].add_(0.1)
            seen.add(model.fingerprint())
            assert model.fingerprint() in seen
    changed = sum("layers.1" in name or "gradmem" in name for name, _ in model.named_parameters())
    assert len(seen) == changed + 1


def test_fingerprint_ignores_what_does_not_matter():
    model = make()
    before = model.fingerprint()
    config = model.peft_config["default"]
    config.write_steps, config.write_lr, config.inference_mode = 7, 0.1, True
    model.train()
    assert model.fingerprint() == before
    rounded = tiny().bfloat16()
    prints = []
    for backbone in (copy.deepcopy(rounded), copy.deepcopy(rounded).float()):
        torch.manual_seed(1)
        prints.append(get_peft_model(backbone, GradMemConfig(num_memory_tokens=2)).fingerprint())
    assert prints[0] == prints[1]
