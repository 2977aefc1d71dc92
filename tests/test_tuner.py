"""A well-behaved PEFT tuner: several adapters, disabling, unloading, status, what is trained."""

import copy

import pytest
import torch
from adapters import lora, make
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import ARCHITECTURES, tiny, tokens

from gradmem_adapter import GradMemConfig

IDS = tokens(2, 9)


@pytest.mark.parametrize("first", [None, lora()])
@pytest.mark.parametrize("second", [None, lora(r=3)])
def test_adapters_can_be_switched_and_deleted(first, second):
    model = make(lora_config=copy.deepcopy(first))
    a = model.write(IDS)
    config = GradMemConfig(num_memory_tokens=4, write_lr=0.3, lora_config=copy.deepcopy(second), memory_init_std=0.5)
    model.add_adapter("other", config)
    assert model.write(IDS).equal(a)  # the new one is not active yet
    model.set_adapter("other")
    b = model.write(IDS)
    assert b.num_memory_tokens == 4
    assert b.fingerprint != a.fingerprint
    with pytest.raises(ValueError, match=f"written by model {a.fingerprint}, but this is model {b.fingerprint}"):
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
def test_a_disabled_or_unloaded_model_is_the_backbone(architecture, with_lora):
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


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_before_a_weight_is_touched(how):
    model = make(lora_config=lora(), lora_phase="write")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        getattr(model, how)()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("with_lora", [False, True])
def test_without_its_last_adapter_the_model_is_the_backbone(with_lora):
    backbone, options = tiny(), {"max_new_tokens": 5, "do_sample": False}
    model = make(lora_config=lora() if with_lora else None)
    model.delete_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, backbone(IDS).logits)
    assert torch.equal(model.generate(IDS, **options), backbone.generate(IDS, **options))
    with pytest.raises(ValueError, match="got 0"):
        model.write(IDS)
    model.add_adapter("other", GradMemConfig(num_memory_tokens=2))
    model.set_adapter("other")
    assert model.write(IDS).num_memory_tokens == 2


@pytest.mark.parametrize(
    "add",
    [
        lambda model: get_peft_model(model.get_base_model(), lora()),
        lambda model: get_peft_model(model, lora(), "other"),
        lambda model: model.get_base_model().add_adapter(lora()),
        lambda model: inject_adapter_in_model(lora(), model.get_base_model()),
    ],
)
def test_an_adapter_of_another_method_is_refused_and_nothing_changes(add):
    """PEFT once replaced our configuration with that one's, and the next write ended in a KeyError."""
    model = make()
    state, names = model.write(IDS), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"has a GradMem adapter, .* of a LoraConfig would .*lora_config=.*unload"):
        add(model)
    assert [name for name, _ in model.named_parameters()] == names
    model.set_adapter("default")
    assert copy.deepcopy(model).write(IDS).equal(state)
    get_peft_model(model.unload(), lora())


def test_an_adapter_that_cannot_be_made_leaves_nothing():
    """Its LoRA once stayed in the layers before the one that cannot have one."""
    wrong = GradMemConfig(num_memory_tokens=2, lora_config=LoraConfig(r=2, target_modules=["q_proj", "norm"]))
    backbone = tiny()
    backbone.lm_head.requires_grad_(False)
    expected = backbone(IDS).logits
    parameters = [(name, parameter.requires_grad) for name, parameter in backbone.named_parameters()]
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(backbone, copy.deepcopy(wrong))
    assert [(name, parameter.requires_grad) for name, parameter in backbone.named_parameters()] == parameters
    assert torch.equal(backbone(IDS).logits, expected)
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=2))
    state = model.write(IDS)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="is not supported"):
        model.add_adapter("other", wrong)
    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert not any(".other" in name for name, _ in model.named_parameters())
    assert model.write(IDS).equal(state)
    model.add_adapter("other", GradMemConfig(num_memory_tokens=2))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_for_each_row_is_refused(call):
    model = make()
    state = model.write(IDS)
    with pytest.raises(NotImplementedError, match=r"adapter_names cannot be used.*set_adapter"):
        getattr(model, call)(input_ids=IDS, memory=state, adapter_names=["default", "__base__"])


def test_an_adapter_can_have_the_backbones_dtype():
    config = GradMemConfig(
        num_memory_tokens=3, num_control_tokens=1, memory_projection="shared", write_head=True, start="pooled_context",
        learn_write_lr="scalar", lora_config=lora(),
    )  # fmt: skip
    model = get_peft_model(tiny().bfloat16(), config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(input_ids=IDS, labels=IDS, context_input_ids=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    state = model.eval().write(IDS)
    assert state.dtype == torch.float32
    assert model.write(IDS, initial=state, steps=0).vectors.equal(state.vectors)
    assert model.generate(IDS, memory=state, max_new_tokens=2).shape == (2, 11)


def test_trainable_parameters_are_counted(capsys):
    model = make(memory_projection="shared", num_control_tokens=2, learn_write_lr="scalar")
    assert model.get_nb_trainable_parameters()[0] == 3 * 32 + 32 * 32 + 32 + 4 * 2 * 32 + 1
    model.print_trainable_parameters()
    assert "trainable params: 1,409" in capsys.readouterr().out


def test_only_the_requested_parameters_are_trainable():
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


def test_an_adapter_on_a_half_precision_backbone_is_float32():
    model = get_peft_model(tiny().bfloat16(), GradMemConfig(num_memory_tokens=3, write_head=True)).eval()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "gradmem_" in name else torch.bfloat16), name
    assert model.generate(IDS, memory=model.write(IDS), max_new_tokens=2).shape == (2, 11)
    model.to(torch.float64)
    assert model.write(IDS).dtype == torch.float64
