"""Backbones on which an adapter would give wrong results are refused."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BigBirdConfig,
    BigBirdForCausalLM,
    CpmAntConfig,
    LlamaForCausalLM,
)

from gradmem_adapter import GradMemConfig, probe


@pytest.fixture(autouse=True)
def _tried_anew(monkeypatch):
    monkeypatch.setattr(probe, "_right", set())


def bidirectional(kind):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "bert-generation": lambda: AutoConfig.for_model("bert-generation", intermediate_size=48, **sizes),
        "xlnet": lambda: AutoConfig.for_model("xlnet", vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48),
        "cpmant": lambda: CpmAntConfig(dim_head=8, dim_ff=48, prompt_length=2, **sizes),
    }[kind]()
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["bert-generation", "xlnet", "cpmant"])
def test_a_backbone_that_is_not_causal_is_refused(kind):
    with pytest.raises(TypeError, match=r"logits change by .*% when later tokens do.*needs a causal"):
        get_peft_model(bidirectional(kind), GradMemConfig())


class LooksAtTokens(LlamaForCausalLM):
    """Has a second kind of embeddings, as Gemma 3n and Gemma 4 have for each layer."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits * (1 + input_ids[..., None] % 2)
        return output


class NeedsMore(LlamaForCausalLM):
    def forward(self, input_ids=None, states=None, **kwargs):
        raise ValueError("states cannot be None")


class OutsideOfItsHead(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, output_hidden_states=True, **kwargs)
        output.logits = output.logits + output.hidden_states[0].mean()
        return output


class WithoutGradient(LlamaForCausalLM):
    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class DropsEmbeddings(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}


class Overflowing(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 0
        return output


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (LooksAtTokens, "from inputs_embeds differ by .*% from those of the same tokens as input_ids"),
        (NeedsMore, r"its own forward pass over token ids failed \(ValueError: states"),
        (OutsideOfItsHead, "'model' and the output head failed"),
        (WithoutGradient, "backward pass to its input embeddings failed"),
        (DropsEmbeddings, "drops inputs_embeds"),
        (Overflowing, "not finite in torch.float32"),
    ],
)
def test_a_backbone_that_memory_cannot_pass_through_is_refused(kind, found):
    backbone = kind(tiny().config)
    with pytest.raises(TypeError, match=rf"{kind.__name__}: .*{found}.*probe_backbone=False"):
        get_peft_model(backbone, GradMemConfig())
    assert not any("gradmem" in name for name, _ in backbone.named_parameters())
    get_peft_model(backbone, GradMemConfig(probe_backbone=False))


def needing_tokens(kind):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    return {
        "deepseek_v4": lambda: AutoConfig.for_model(  # routes by token
            kind, moe_intermediate_size=48, q_lora_rank=8, num_hash_layers=1, n_routed_experts=4,
            num_experts_per_tok=2, o_groups=2, o_lora_rank=8, **sizes,
        ),
        "gemma4_text": lambda: AutoConfig.for_model(  # looks up a vector's token, for embeddings of each layer
            kind, intermediate_size=48, num_key_value_heads=2, global_head_dim=16, num_kv_shared_layers=0,
            vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, **sizes,
            layer_types=["sliding_attention", "full_attention"],
        ),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["deepseek_v4", "gemma4_text"])
def test_a_backbone_whose_layers_need_token_ids_is_refused(kind):
    with pytest.raises(TypeError, match="failed on inputs_embeds alone"):
        get_peft_model(AutoModelForCausalLM.from_config(needing_tokens(kind)), GradMemConfig())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "bert", "roberta", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_leaves_good_backbones_unchanged(architecture, dtype):
    backbone = tiny(architecture).to(dtype).train()
    backbone.get_output_embeddings().eval()
    modes = [module.training for module in backbone.modules()]
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    draws = torch.get_rng_state()
    probe.probe(backbone)
    assert torch.equal(torch.get_rng_state(), draws)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_what_a_backbone_changes_in_itself_during_the_probe_is_undone():
    """BigBird replaces its attention for good when it sees a short sequence."""
    config = BigBirdConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=96, block_size=4, num_random_blocks=1, is_decoder=True,
    )  # fmt: skip
    backbone = BigBirdForCausalLM(config)
    backbone.bert.register_buffer("calls", torch.zeros(()), persistent=False)
    backbone.bert.register_forward_pre_hook(lambda module, _: setattr(module, "calls", module.calls + 1))
    attention, calls = backbone.bert.attention_type, backbone.bert.calls
    probe.probe(backbone)
    assert backbone.bert.attention_type == attention
    assert backbone.bert.calls is calls


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 3},
        {"stop_strings": ["</s>"]},
        {"cache_implementation": "static"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prefill_chunk_size": 2},
        {"max_time": 1e-9},
        {"token_healing": True},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 5},
        {"eos_token_id": list(range(61))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_users_generation_settings_do_not_affect_the_probe(settings):
    backbone = tiny()
    for name, value in settings.items():
        setattr(backbone.generation_config, name, value)
    config, before = backbone.generation_config, backbone.generation_config.to_dict()
    probe.probe(backbone)
    assert backbone.generation_config is config
    assert config.to_dict() == before


def test_the_probe_runs_once_per_kind_and_not_on_loading(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(probe, "_check_causal", lambda backbone, *_: tried.append(type(backbone)))
    get_peft_model(tiny(), GradMemConfig()).save_pretrained(tmp_path)
    model = get_peft_model(tiny(seed=1), GradMemConfig())
    model.add_adapter("other", GradMemConfig())
    assert tried == [LlamaForCausalLM]
    monkeypatch.setattr(probe, "_right", set())
    PeftModel.from_pretrained(tiny(), tmp_path)
    get_peft_model(tiny(), GradMemConfig(probe_backbone=False))
    assert tried == [LlamaForCausalLM]
    PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    get_peft_model(tiny("gpt2"), GradMemConfig())
    assert len(tried) == 3


def test_probe_backbone_is_not_saved_with_the_adapter(tmp_path):
    config = GradMemConfig(probe_backbone=False)
    assert not config.probe_backbone
    assert not dataclasses.replace(config, write_steps=1).probe_backbone
    config.save_pretrained(tmp_path)
    assert "probe_backbone" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert GradMemConfig.from_pretrained(tmp_path).probe_backbone
    with pytest.raises(TypeError, match="probe_backbone"):
        GradMemConfig(probe_backbone="no")


def test_a_backbone_that_cannot_be_probed_is_attached_with_a_warning():
    with torch.device("meta"):
        backbone = LlamaForCausalLM(tiny().config)
    with pytest.warns(UserWarning, match=r"could not be tested.*meta device"):
        get_peft_model(backbone, GradMemConfig())
    backbone = tiny("gpt2")
    backbone.transformer.h[0].mlp = nn.Linear(7, 7)  # like a kernel for a device that the model is not on yet
    with pytest.warns(UserWarning, match=r"its own forward pass over token ids failed \(RuntimeError"):
        model = get_peft_model(backbone, GradMemConfig())
    with pytest.raises(RuntimeError):
        model.write(tokens(1, 5))
