"""A cache from an earlier turn continues with the memory it was made with, and with no other."""

import copy

import pytest
import torch
from peft import get_peft_model
from reading import make
from tiny import ARCHITECTURES, tokens
from tiny_pipeline import tiny_pipeline
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache, cache_utils

from gradmem_adapter import GradMemConfig, MemoryState

OPTIONS = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}


def turn(model, prompt, memory, **options):
    return model.generate(prompt, memory=memory, return_dict_in_generate=True, **OPTIONS | options)


def longer(first):
    return torch.cat([first.sequences, tokens(len(first.sequences), 3, seed=5)], dim=1)


def refused(how):
    return pytest.raises(ValueError, match=f"was filled {how}, and the answer would come from that")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_of_another_memory_is_refused(architecture):
    model = make(architecture)
    state, other = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    first = turn(model, tokens(1, 4), state)
    cache, prompt = first.past_key_values, longer(first)
    with refused("with another memory"):
        turn(model, prompt, other, past_key_values=cache)
    with refused("with a memory"):
        turn(model, prompt, None, past_key_values=cache)
    expected = turn(model, prompt, state)
    assert torch.equal(turn(model, prompt, state, past_key_values=cache).sequences, expected.sequences)
    cache = turn(model, tokens(1, 4), None).past_key_values
    with refused("without memory"):
        turn(model, prompt, state, past_key_values=cache)
    turn(model, prompt, state, past_key_values=cache, strict=False)


def test_a_pipeline_without_memory_refuses_a_cache_with_one():
    pipeline = tiny_pipeline()
    ids, mask = pipeline.encode_prompts(["w1 w2 w3"])
    options = {"return_dict_in_generate": True, "max_new_tokens": 4}
    first = pipeline.generate_ids(ids, mask, memory=pipeline.write("w5 w6"), **options)
    prompt = first.sequences
    with refused("with a memory"):
        pipeline.generate_ids(prompt, torch.ones_like(prompt), past_key_values=first.past_key_values, **options)


def test_the_same_memory_in_another_object_is_accepted(tmp_path):
    model = make()
    states = model.write(tokens(2, 9))
    states.save(tmp_path / "states.safetensors")
    loaded = MemoryState.load(tmp_path / "states.safetensors")
    first = turn(model, tokens(3, 4), states, context_index=torch.tensor([1, 0, 1]))
    prompt = longer(first)
    expected = turn(model, prompt, states[[1, 0, 1]]).sequences
    for memory, index in (
        (states, [1, 0, 1]),
        (loaded, [1, 0, 1]),
        (loaded[[1, 0]], [0, 1, 0]),
        (loaded[[1, 0, 1]], None),
    ):
        cache, index = copy.deepcopy(first.past_key_values), None if index is None else torch.tensor(index)
        assert torch.equal(turn(model, prompt, memory, context_index=index, past_key_values=cache).sequences, expected)
    with refused("with another memory"):
        turn(model, prompt, states[[0, 1, 0]], past_key_values=first.past_key_values)


def test_vectors_changed_in_place_count_as_another_memory():
    model = make()
    state = model.write(tokens(1, 9))
    first = turn(model, tokens(1, 4), state)
    state.vectors.mul_(2)
    with refused("with another memory"):
        turn(model, longer(first), state, past_key_values=first.past_key_values)


KINDS = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic of no model": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):  # the quantised one that needs no other package
    KINDS["quantised"] = lambda config: QuantizedCache("fp8", config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_new_caches_of_every_kind_are_tied_to_their_memory(kind):
    model = make()
    state, other = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    cache = KINDS[kind](model.config)
    first = turn(model, tokens(1, 4), state, past_key_values=cache)
    assert first.past_key_values is cache
    for same in (copy.deepcopy(cache), cache):
        with refused("with another memory"):
            turn(model, longer(first), other, past_key_values=same)
        assert turn(model, longer(first), state, past_key_values=same).past_key_values is same
    cache.reset()
    assert turn(model, tokens(1, 4), None, past_key_values=cache).past_key_values is cache
    with refused("without memory"):
        turn(model, longer(first), state, past_key_values=cache)


def test_our_own_static_cache_is_tied_to_its_memory():
    model = make()
    state, other = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    first = turn(model, tokens(1, 4), state, cache_implementation="static", max_cache_len=40)
    with refused("with another memory"):
        turn(model, longer(first), other, past_key_values=first.past_key_values)
    expected = turn(model, longer(first), state).sequences
    assert torch.equal(turn(model, longer(first), state, past_key_values=first.past_key_values).sequences, expected)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_a_cache_with_several_rows_per_prompt_is_tied_to_its_memory(options):
    """The cache has two rows for each prompt, which beams reorder."""
    model = make()
    states = model.write(tokens(2, 9))
    first = turn(model, tokens(2, 4), states, **options)
    prompt, twice, cache = longer(first), torch.tensor([0, 0, 1, 1]), first.past_key_values
    if len(prompt) == 2:  # the best beam of each
        turn(model, prompt, states, past_key_values=copy.deepcopy(cache), **options)
        prompt = prompt.repeat_interleave(2, dim=0)
    turn(model, prompt, states, context_index=twice, past_key_values=copy.deepcopy(cache))
    with refused("with another memory"):
        turn(model, prompt, states, context_index=twice.flip(0), past_key_values=cache)


def test_rows_selected_from_a_cache_keep_their_memory():
    model = make()
    states, other = model.write(tokens(3, 9)), model.write(tokens(2, 9, seed=3))
    first = turn(model, tokens(3, 4), states)
    cache, rows = first.past_key_values, torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    prompt = longer(first)[rows]
    with refused("with another memory"):
        turn(model, prompt, other, past_key_values=cache)
    expected = turn(model, prompt, states[rows]).sequences
    assert torch.equal(turn(model, prompt, states[rows], past_key_values=cache).sequences, expected)


def test_the_cache_of_a_forward_pass_is_tied_to_its_memory():
    model = make()
    state, other = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    prompt = tokens(1, 6)
    with torch.no_grad():
        cache = model(input_ids=prompt[:, :4], memory=state, use_cache=True).past_key_values
    with refused("with another memory"):
        turn(model, prompt, other, past_key_values=cache)
    expected = turn(model, prompt, state).sequences
    assert torch.equal(turn(model, prompt, state, past_key_values=cache).sequences, expected)


def test_a_cache_that_counts_no_tokens_is_tied_to_its_memory():
    config = AutoConfig.for_model(
        "mamba", vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), GradMemConfig(num_memory_tokens=3)).eval()
    state, other = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    first = turn(model, tokens(1, 4), state)
    cache = first.past_key_values
    with refused("with another memory"):
        turn(model, longer(first), other, cache_params=cache)
