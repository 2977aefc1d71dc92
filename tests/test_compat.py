"""Checkpoints of the authors' code: tensors in and out under their names, and errors when one does not fit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.compat import authors_names, config_from_authors_options, load_authors_checkpoint

OPTIONS = {"n_mem_tokens": 3, "K": 2, "lr": 0.1}
ALL = OPTIONS | {
    "grad_mode": "second",
    "use_write_head": True,
    "use_mem_proj": True,
    "mem_proj_mode": "proj",
    "n_ctrl_tokens": 2,
    "inner_clip_norm": 1.5,
    "last_K_second_order": 1,
    "add_inner_loss_to_outer": True,
    "inner_loss_weight": 0.25,
}
OWN = {
    "mem",
    "mem_proj.weight",
    "mem_proj.bias",
    "write_head.weight",
    "write_st",
    "write_end",
    "read_st",
    "read_end",
}


def export(architecture="llama", options=ALL, dtype=torch.float32):
    """A model with random slots, its tensors under the authors' names, and its backbone's config."""
    backbone = tiny(architecture).to(dtype)
    model = get_peft_model(backbone, config_from_authors_options(options), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in authors_names(model).items():
            if not name.startswith("model."):
                parameter.copy_(torch.randn_like(parameter))
    return model, {name: p.detach().clone() for name, p in authors_names(model).items()}, backbone.config


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [OPTIONS, ALL], ids=["least", "all"])
def test_a_checkpoint_survives_a_round_trip(architecture, options):
    model, state_dict, config = export(architecture, options)
    assert {name for name in state_dict if not name.startswith("model.")} == ({"mem"} if options is OPTIONS else OWN)
    loaded = load_authors_checkpoint(state_dict, config, options)
    again = authors_names(loaded)
    assert again.keys() == state_dict.keys()
    assert all(torch.equal(parameter, state_dict[name]) for name, parameter in again.items())
    assert all(parameter.requires_grad for parameter in again.values())
    assert not loaded.training
    state = loaded.write(tokens(2, 7))
    assert state.equal(model.write(tokens(2, 7)))
    query = tokens(2, 4, seed=1)
    assert torch.equal(loaded(input_ids=query, memory=state).logits, model(input_ids=query, memory=state).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_checkpoint(dtype):
    _, state_dict, config = export(options=OPTIONS, dtype=dtype)
    state_dict["mem"] = state_dict["mem"].to(dtype)
    loaded = load_authors_checkpoint(state_dict, config, OPTIONS)
    assert loaded.get_base_model().dtype == dtype
    assert all(torch.equal(p, state_dict[name]) for name, p in authors_names(loaded).items())


def test_base_config_can_be_an_object_or_a_dict():
    _, state_dict, config = export(options=OPTIONS)
    before = config.to_dict()
    fields = dict(before)
    first = load_authors_checkpoint(state_dict, config, OPTIONS)
    second = load_authors_checkpoint(state_dict, fields, OPTIONS)
    assert first.write(tokens(1, 5)).equal(second.write(tokens(1, 5)))
    assert fields == before == config.to_dict()  # what the caller passed stays as it was


@pytest.mark.parametrize(
    "name", ["mem", "mem_proj.bias", "read_end", "model.lm_head.weight", "model.model.norm.weight"]
)
def test_a_missing_tensor_is_named(name):
    _, state_dict, config = export()
    del state_dict[name]
    with pytest.raises(ValueError, match=rf"missing \['{name}'\], unexpected \[\]"):
        load_authors_checkpoint(state_dict, config, ALL)


@pytest.mark.parametrize("name", ["mem_proj.weight", "model.extra", "other"])
def test_an_unexpected_tensor_is_named(name):
    _, state_dict, config = export(options=OPTIONS)
    state_dict[name] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"missing \[\], unexpected \['{name}'\]"):
        load_authors_checkpoint(state_dict, config, OPTIONS)


@pytest.mark.parametrize("name", ["mem", "write_head.weight", "model.lm_head.weight"])
def test_a_wrong_shape_is_named(name):
    _, state_dict, config = export()
    shape = tuple(state_dict[name].shape)
    state_dict[name] = state_dict[name][:1]
    with pytest.raises(ValueError, match=f"{name} has shape ") as caught:
        load_authors_checkpoint(state_dict, config, ALL)
    assert str((1, *shape[1:])) in str(caught.value)
    assert str(shape) in str(caught.value)


def test_a_tied_checkpoint_may_contain_its_head():
    model, state_dict, config = export("gpt2", OPTIONS)
    assert "model.lm_head.weight" not in state_dict
    state_dict["model.lm_head.weight"] = state_dict["model.transformer.wte.weight"].clone()
    loaded = load_authors_checkpoint(state_dict, config, OPTIONS)
    assert loaded.write(tokens(1, 5)).equal(model.write(tokens(1, 5)))


class TestOptions:
    def test_all_options_are_translated(self):
        config = config_from_authors_options(ALL)
        assert config.num_memory_tokens == 3
        assert config.write_steps == 2
        assert config.write_lr == 0.1
        assert config.meta_gradient == "exact"
        assert config.second_order_steps == 1
        assert config.write_clip_norm == 1.5
        assert config.memory_projection == "shared"
        assert config.write_head is True
        assert config.num_control_tokens == 2
        assert config.reconstruction_weight == 0.25
        assert config.train_backbone is True

    def test_missing_options_have_the_authors_defaults(self):
        config = config_from_authors_options(OPTIONS | {"architecture": "gpt2", "base_config": {}})
        assert config == GradMemConfig(num_memory_tokens=3, write_steps=2, write_lr=0.1, train_backbone=True)
        assert config_from_authors_options(OPTIONS | {"inner_loss_weight": 0.5}).reconstruction_weight == 0
        assert config_from_authors_options(OPTIONS | {"use_mem_proj": False, "mem_proj_mode": "proj"}) == config
        projected = config_from_authors_options(OPTIONS | {"mem_proj_mode": "proj"})
        assert projected.memory_projection == "shared"

    @pytest.mark.parametrize(("theirs", "ours"), [("second", "exact"), ("first", "first_order"), ("none", "none")])
    def test_grad_mode_is_translated(self, theirs, ours):
        assert config_from_authors_options(OPTIONS | {"grad_mode": theirs}).meta_gradient == ours

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k": 3}, r"Unknown options \['k'\]\. Known options are \["),
            ({"grad_mode": "third"}, "grad_mode must be one of .* got 'third'"),
            ({"mem_proj_mode": "per_token"}, "mem_proj_mode must be 'proj' .* got 'per_token'"),
        ],
    )
    def test_invalid_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            config_from_authors_options(OPTIONS | options)

    @pytest.mark.parametrize("name", OPTIONS)
    def test_missing_required_options_are_named(self, name):
        with pytest.raises(ValueError, match=rf"The options \['{name}'\] are missing"):
            config_from_authors_options({key: value for key, value in OPTIONS.items() if key != name})


@pytest.mark.parametrize(
    "part",
    [{"lora_config": LoraConfig(target_modules=["q_proj"])}, {"learn_write_lr": "scalar"}, {"start": "context"}],
)
def test_parts_without_a_counterpart_are_refused(part):
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2, **part))
    with pytest.raises(ValueError, match="no counterpart in the authors' code"):
        authors_names(model)


def test_a_tied_weight_that_differs_is_named():
    _, state_dict, config = export("gpt2", options=OPTIONS)
    state_dict["model.lm_head.weight"] = state_dict["model.transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match=r"model\.lm_head\.weight differs from the weights that base_config ties"):
        load_authors_checkpoint(state_dict, config, OPTIONS)
