"""The map from hidden states to logits, by the backbone's own code."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from gradmem_adapter.ops.output_head import output_head, trains_head
from gradmem_adapter.utils.backbone import trunk, trunk_name


def falcon_h1():
    """Scales its logits by a factor that it reads from its trunk."""
    config = AutoConfig.for_model(
        "falcon_h1", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
        mamba_chunk_size=8, lm_head_multiplier=0.5,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def nameless():
    """Its `base_model_prefix` is that of a larger model, as in Llama 4's text model."""
    model = tiny()
    model.base_model_prefix = "language_model"
    return model


MODELS = {name: lambda name=name: tiny(name) for name in (*ARCHITECTURES, "bert")}
MODELS |= {"falcon_h1": falcon_h1, "nameless": nameless}


@pytest.mark.parametrize("name", MODELS)
def test_trunk_and_head_equal_the_model(name):
    model, ids = MODELS[name](), tokens(2, 6)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        hidden = trunk(model)(inputs_embeds=embeddings, use_cache=False, return_dict=True).last_hidden_state
        torch.testing.assert_close(output_head(model)(hidden), model(inputs_embeds=embeddings).logits)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_after_the_trunk_count_as_the_head(name):
    model = MODELS[name]().requires_grad_(False)
    tables = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    assert not trains_head(model)
    for parameter in model.parameters():
        behind = all(parameter is not inner for inner in trunk(model).parameters()) or (
            id(parameter) in tables and model.get_output_embeddings().weight is parameter
        )
        parameter.requires_grad_(True)
        assert trains_head(model) == behind
        parameter.requires_grad_(False)


def test_a_model_without_a_trunk_is_refused():
    model = tiny()
    del model._modules[trunk_name(model)]
    model.get_input_embeddings = lambda: torch.nn.Embedding(3, 2)
    with pytest.raises(TypeError, match="no submodule between input embeddings and output head"):
        trunk(model)
