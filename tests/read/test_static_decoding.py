"""Decoding into a static cache gives the same tokens as the default cache, and leaves the model unchanged."""

import pytest
import torch
from reading import ROWS, Collect, make, pad_left, pad_right
from tiny import tokens
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

from gradmem_adapter import GradMemConfig, get_peft_model
from gradmem_adapter.read.generation import own_cache

STATIC = {"cache_implementation": "static"}
USUAL = ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "mixtral")
WINDOWS = ("gemma3_text", "mistral")


def both(model, ids, **options):
    """What is generated with the default cache, and with a static one without and with a kept prefix."""
    options = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False} | options
    model.prefix_cache.clear()
    static = [model.generate(ids, **STATIC, **options) for _ in range(2)]
    model.prefix_cache.clear()
    return [model.generate(ids, **options), *static]


def assert_all_equal(expected, *others):
    for other in others:
        assert torch.equal(other, expected)


@pytest.mark.parametrize("architecture", [*USUAL, *WINDOWS, "bert", "roberta"])
def test_questions_of_different_lengths_on_one_state_each(architecture):
    model = make(architecture)
    state = model.write(tokens(3, 9))
    for pad in (pad_left, pad_right):
        ids, mask = pad(ROWS, 7)
        assert_all_equal(*both(model, ids, attention_mask=mask, memory=state))


@pytest.mark.parametrize("architecture", [*USUAL, *WINDOWS])
@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("beams", [1, 2])
def test_questions_of_one_length(architecture, states, beams):
    model = make(architecture)
    state = model.write(tokens(states, 9))
    assert_all_equal(*both(model, tokens(4, 5, seed=1), memory=state, num_beams=beams, num_return_sequences=beams))


def test_sampling_and_early_ends():
    model = make()
    state, ids = model.write(tokens(2, 9)), tokens(2, 5, seed=1)

    def sample(**options):
        torch.manual_seed(3)
        return model.generate(ids, memory=state, max_new_tokens=20, do_sample=True, num_return_sequences=3, **options)

    assert_all_equal(sample(), sample(**STATIC), sample(**STATIC))
    ends = model.generate(ids, memory=state, max_new_tokens=9, eos_token_id=None)[:, -3].tolist()
    assert_all_equal(*both(model, ids, memory=state, eos_token_id=ends))


def test_states_side_by_side_and_by_index():
    model = make()
    state, ids = model.write(tokens(3, 9)), tokens(2, 5, seed=1)
    assert_all_equal(*both(model, ids, memory=state, context_index=torch.tensor([2, 0])))
    assert_all_equal(*both(model, ids, memory=state, context_index=torch.tensor([[2, 0], [1, 1]])))


def test_a_kept_prefix_is_shared_by_both_caches():
    model = make()
    state, ids, lengths = model.write(tokens(1, 9)), tokens(4, 5, seed=1), []

    def count(module, args, kwargs):
        if kwargs.get("inputs_embeds") is not None:
            lengths.append(kwargs["inputs_embeds"].shape[1])

    model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)
    prefix = model.prefix_length
    for first, then in ((STATIC, {}), ({}, STATIC)):
        model.prefix_cache.clear()
        lengths.clear()
        texts = [model.generate(ids, memory=state, eos_token_id=None, **options) for options in (first, then)]
        assert torch.equal(*texts)
        assert lengths == [prefix + 5, 5]
    kept = model.prefix_cache.nbytes
    model.generate(ids, memory=state, **STATIC)
    assert model.prefix_cache.nbytes == kept
    model.prefix_cache.max_bytes = 10
    model.generate(ids, memory=state, **STATIC)
    assert model.prefix_cache.nbytes == 0


def test_tokens_are_streamed():
    model, streamer = make(), Collect()
    output = model.generate(tokens(1, 5), memory=model.write(tokens(1, 9)), streamer=streamer, **STATIC)
    assert torch.equal(torch.cat(streamer.pieces), output[0])


def test_the_models_default_cache_is_used():
    model = make()
    state, ids, backbone = model.write(tokens(1, 9)), tokens(1, 5, seed=1), model.get_base_model()
    expected = model.generate(ids, memory=state)
    backbone.generation_config.cache_implementation = "static"
    before = set(backbone.__dict__)
    output = model.generate(ids, memory=state, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert type(output.past_key_values).__name__ == "StaticCache"
    assert set(backbone.__dict__) == before


def test_unsupported_options_are_left_to_transformers():
    model = make()
    backbone = model.get_base_model()
    assert own_cache(backbone, STATIC) == "static"
    for option in ({"compile_config": CompileConfig()}, {"output_attentions": True}, {"use_cache": False}):
        assert own_cache(backbone, STATIC | option) is None
    for architecture in WINDOWS:
        assert own_cache(make(architecture).get_base_model(), STATIC) is None
    state, ids = model.write(tokens(1, 9)), tokens(1, 5, seed=1)
    first = model.generate(ids, memory=state, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(first.sequences, memory=state, past_key_values=first.past_key_values, **STATIC)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator can be offloaded from")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_need_an_accelerator(kind):
    model = make()
    state, ids = model.write(tokens(1, 9)), tokens(1, 5, seed=1)
    with pytest.raises(ValueError, match=f"'{kind}' moves layers of the cache between an accelerator and the CPU"):
        model.generate(ids, memory=state, cache_implementation=kind)


@pytest.mark.parametrize("kind", ["bamba", "falcon_h1", "mamba", "openai-gpt"])
def test_backbones_with_more_than_attention(kind):
    """Their states are not only keys and values, so Transformers makes the cache."""
    fields = {
        "bamba": {
            "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "head_dim": 8},
        "mamba": {"state_size": 4},
        "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    }[kind]  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    if kind in ("bamba", "falcon_h1"):
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=61, pad_token_id=0, **({} if kind == "openai-gpt" else sizes), **fields
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), GradMemConfig(num_memory_tokens=3)).eval()
    assert_all_equal(*both(model, tokens(2, 5, seed=1), memory=model.write(tokens(2, 9))))
