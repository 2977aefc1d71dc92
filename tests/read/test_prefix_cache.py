"""A prefix is computed once per state, with the same results as without the cache."""

import copy
import gc
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from reading import Collect
from tiny import ARCHITECTURES, tiny, tokens
from transformers import CompileConfig

from gradmem_adapter import GradMemConfig, MemoryState
from gradmem_adapter.read.prefix_cache import PrefixCache, ReadCache, prefix_key

PREFIX, QUERY = 5, 4


def make(architecture="llama", backbone=None, **config):
    """A model with a prefix of 5 positions (3 vectors, a control vector on either side) that matters."""
    backbone = tiny(architecture) if backbone is None else backbone
    scale = float(backbone.get_input_embeddings()(torch.arange(3, 20)).detach().std())
    defaults = {"num_memory_tokens": 3, "num_control_tokens": 1, "write_lr": 0.3, "memory_init_std": scale}
    return get_peft_model(backbone, GradMemConfig(**defaults | config)).eval()


@contextmanager
def prefilled(model):
    """How many positions the backbone got in the first pass of each `generate` with memory."""
    lengths = []

    def count(module, args, kwargs):
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None:
            lengths.append(embeddings.shape[1])

    handle = model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


def generate(model, state, prompt=None, **options):
    prompt = tokens(1, QUERY, seed=1) if prompt is None else prompt
    torch.manual_seed(7)
    return model.generate(prompt, memory=state, **{"max_new_tokens": 6, "eos_token_id": None, **options})


def without_reuse(model, *args, **options):
    kept, model.base_model.prefix_cache = model.prefix_cache, PrefixCache(max_bytes=0)
    try:
        return generate(model, *args, **options)
    finally:
        model.base_model.prefix_cache = kept


DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("states", [1, 2], ids=["one state", "a state per prompt"])
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_second_call_skips_the_prefix_and_gives_the_same_tokens(architecture, decoding, states):
    model = make(architecture)
    state = model.write(tokens(states, 9))
    options = DECODING[decoding]
    for seed in (1, 2):  # what the first call keeps serves another prompt as well
        prompt = tokens(2, QUERY, seed=seed)
        expected = without_reuse(model, state, prompt, **options)
        if seed == 1:
            assert torch.equal(generate(model, state, prompt, **options), expected)
        with prefilled(model) as lengths:
            for _ in range(2):
                assert torch.equal(generate(model, state, prompt, **options), expected)
        assert lengths == [QUERY, QUERY]


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral"])
def test_a_window_shorter_than_prefix_and_text(architecture):
    model = make(architecture, num_memory_tokens=20)
    state, prompt = model.write(tokens(1, 9)), tokens(3, 30, seed=1)
    expected = without_reuse(model, state, prompt, max_new_tokens=20)
    for _ in range(3):
        assert torch.equal(generate(model, state, prompt, max_new_tokens=20), expected)
    assert len(model.prefix_cache) == 1


def test_keys_whose_rotation_depends_on_the_text_length():
    """Phi-3's longrope: beyond the original length all keys have other angles, including the prefix's."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    model = make(backbone=tiny(rope_parameters=rope))
    state = model.write(tokens(1, 9))
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    for length in (4, 20, 4):
        prompt = tokens(1, length, seed=1)
        expected = without_reuse(model, state, prompt, **options).logits
        torch.testing.assert_close(generate(model, state, prompt, **options).logits, expected)


def test_a_cached_prefix_is_used_without_a_copy_and_never_overwritten():
    backbone = tiny("llama")
    heads, size = backbone.config.num_key_value_heads, backbone.config.head_dim
    prefix = tuple(
        (torch.randn(1, heads, PREFIX, size), torch.randn(1, heads, PREFIX, size))
        for _ in range(backbone.config.num_hidden_layers)
    )
    before = copy.deepcopy(prefix)
    cache = ReadCache(backbone, prefix, 1, PREFIX, 0)
    for layer, (keys, values) in zip(cache.layers, prefix, strict=True):
        assert layer.keys is keys
        assert layer.values is values
    assert cache.get_seq_length() == PREFIX
    with torch.no_grad():
        backbone(tokens(1, QUERY), past_key_values=cache)
    assert cache.get_seq_length() == PREFIX + QUERY
    for kept, copied in zip(prefix, before, strict=True):
        assert all(map(torch.equal, kept, copied))


def test_scores_and_cache_are_returned_as_without_reuse():
    model = make()
    state = model.write(tokens(1, 9))
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected = without_reuse(model, state, **options)
    for _ in range(2):
        got = generate(model, state, **options)
        torch.testing.assert_close(got.logits, expected.logits)
        for layer, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys)
    kept = [keys.clone() for keys, _ in _prefix(model, state)]
    longer = torch.cat([got.sequences, tokens(1, 3, seed=5)], dim=1)
    next_turn = generate(model, state, longer, past_key_values=got.past_key_values)
    assert torch.equal(next_turn, without_reuse(model, state, longer))
    assert all(torch.equal(a, b) for a, (b, _) in zip(kept, _prefix(model, state), strict=True))


def _prefix(model, state):
    return model.prefix_cache.get(state, prefix_key(model.get_base_model(), model.base_model._fingerprinted()))


def test_streaming_with_a_cached_prefix():
    model = make()
    state, texts = model.write(tokens(1, 9)), []
    for _ in range(2):
        streamer = Collect()
        output = generate(model, state, streamer=streamer)
        assert torch.equal(torch.cat(streamer.pieces), output[0])
        texts.append(output)
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
        {"context_index": torch.tensor([0])},
        {"use_cache": False},
        {"cache_implementation": "static", "compile_config": CompileConfig()},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ],
    ids=["padding", "context_index", "no cache", "another cache", "hidden states"],
)
def test_options_that_prevent_reuse(options):
    model = make()
    state = model.write(tokens(1, 9))
    generate(model, state)
    generate(model, state, **options)  # the first left-padded prompt takes extra passes to try out the backbone
    with prefilled(model) as lengths:
        generate(model, state, **options)
    assert lengths[0] == PREFIX + QUERY


def test_nothing_is_reused_in_training_mode():
    model = make()
    state = model.write(tokens(1, 9))
    generate(model, state)
    model.train()
    with prefilled(model) as lengths:
        generate(model, state)
    assert lengths == [PREFIX + QUERY]


def change_backbone(model, state):
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().weight.mul_(1.5)
        next(p for n, p in model.get_base_model().named_parameters() if "v_proj" in n).mul_(-1)


def change_slots(model, state):
    with torch.no_grad():
        model.base_model.slots.gradmem_read_start["default"].neg_()


def change_adapter(model, state):
    model.add_adapter("other", GradMemConfig(num_memory_tokens=3, num_control_tokens=1, memory_init_std=3.0))
    model.set_adapter("other")


def change_vectors(model, state):
    state.vectors.neg_()


@pytest.mark.parametrize("change", [change_backbone, change_slots, change_adapter, change_vectors])
def test_changes_invalidate_the_prefix(change):
    model = make()
    state = model.write(tokens(1, 9))
    logits = {"return_dict_in_generate": True, "output_logits": True, "strict": False}
    before = generate(model, state, **logits).logits[0]
    change(model, state)
    with prefilled(model) as lengths:
        after = generate(model, state, **logits).logits[0]
        torch.testing.assert_close(after, without_reuse(model, state, **logits).logits[0])
    assert lengths[0] == PREFIX + QUERY
    assert not torch.allclose(before, after)


def test_a_rescaled_lora_invalidates_the_prefix():
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = make(lora_config=lora)
    state = model.write(tokens(1, 9))
    generate(model, state)
    with rescale_adapter_scale(model, 0.1), prefilled(model) as lengths:
        with pytest.raises(ValueError, match="was written by model"):
            generate(model, state)
        generate(model, state, strict=False)
    assert lengths == [PREFIX + QUERY]


def test_autocast_has_its_own_prefix():
    model = make()
    state = model.write(tokens(1, 9))
    generate(model, state)
    with torch.autocast("cpu", torch.bfloat16), prefilled(model) as lengths:
        generate(model, state)
    assert lengths == [PREFIX + QUERY]


def test_a_prefix_from_inference_mode_can_be_reused():
    model = make()
    with torch.inference_mode():
        state = model.write(tokens(1, 9))
        expected = without_reuse(model, state)
        assert torch.equal(generate(model, state), expected)
    assert torch.equal(generate(model, state), expected)


def test_each_state_has_its_own_prefix():
    model = make()
    states = model.write(tokens(2, 9))
    one, other = states[0], states[1]
    expected = [without_reuse(model, state) for state in (one, other)]
    for _ in range(2):
        assert torch.equal(generate(model, one), expected[0])
        assert torch.equal(generate(model, other), expected[1])
    assert len(model.prefix_cache) == 2
    assert MemoryState.stack([one]) is one
    assert MemoryState.concat([one]) is one


def test_an_entry_is_dropped_with_its_state():
    model = make()
    states = [model.write(tokens(1, 9, seed=i)) for i in range(2)]
    for state in states:
        generate(model, state)
    assert len(model.prefix_cache) == 2
    half = model.prefix_cache.nbytes / 2
    del states[0], state
    gc.collect()
    assert len(model.prefix_cache) == 1
    assert model.prefix_cache.nbytes == half


def test_the_size_limit_drops_the_least_recently_used_prefix():
    model = make()
    states = [model.write(tokens(1, 9, seed=i)) for i in range(3)]
    cache = model.prefix_cache
    generate(model, states[0])
    one = cache.nbytes
    # Keys and values of 2 layers with 2 heads of 8, and the vectors.
    assert one == 4 * (2 * 2 * PREFIX * 2 * 8 + 3 * 32)
    tensors = [tensor for layer in _prefix(model, states[0]) for tensor in layer]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)  # no view of a longer cache
    cache.max_bytes = 2 * one
    for i in (1, 0, 2):  # the first is used again before the third is added
        generate(model, states[i])
    assert cache.nbytes == 2 * one
    with prefilled(model) as lengths:
        generate(model, states[0])
        generate(model, states[2])
        generate(model, states[1])
    assert lengths == [QUERY, QUERY, PREFIX + QUERY]
    cache.max_bytes = one - 1
    assert len(cache) == cache.nbytes == 0
    generate(model, states[0])
    assert len(cache) == 0


def test_copies_of_a_model_start_empty():
    model = make()
    state = model.write(tokens(1, 9))
    expected = generate(model, state)
    model.prefix_cache.max_bytes = 12345
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.prefix_cache) == 0
        assert other.prefix_cache.max_bytes == 12345
        assert other.prefix_cache is not model.prefix_cache
        assert torch.equal(generate(other, state), expected)
    assert not any("prefix_cache" in name for name in model.state_dict())


def test_threads_can_share_the_cache():
    """Several at once on the same states, with a bound that makes them drop each other's entries."""
    model = make()
    states = [model.write(tokens(1, 9, seed=i)) for i in range(3)]
    prompts = [tokens(1 + i % 2, QUERY, seed=i) for i in range(6)]
    jobs = [(state, prompt) for state in states for prompt in prompts]
    expected = [without_reuse(model, state, prompt, do_sample=False) for state, prompt in jobs]
    generate(model, states[0])
    model.prefix_cache.max_bytes = 2 * model.prefix_cache.nbytes
    errors = []

    def work(offset):
        try:
            for i in range(len(jobs)):
                j = (i * 5 + offset) % len(jobs)
                state, prompt = jobs[j]
                got = model.generate(prompt, memory=state, max_new_tokens=6, eos_token_id=None, do_sample=False)
                if not torch.equal(got, expected[j]):
                    errors.append(j)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert model.prefix_cache.nbytes <= model.prefix_cache.max_bytes


def test_clear_and_a_cache_outlived_by_its_states():
    model = make()
    state = model.write(tokens(1, 9))
    generate(model, state)
    prefix = _prefix(model, state)
    cache = PrefixCache()
    cache.put(state, "key", prefix)
    assert cache.get(state, "key") is prefix
    assert cache.get(state, "another key") is None
    cache.clear()
    assert cache.get(state, "key") is None
    cache.put(state, "key", prefix)
    del cache
    del state  # whose entry finds its cache gone
    gc.collect()


def test_compiled_layers_keep_prefixes():
    """With symbolic sizes, tensors have no `nbytes`."""
    model = make("llama")
    state, query = model.write(tokens(1, 9)), tokens(1, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(query, memory=state, **options)
    model.base_model.prefix_cache.clear()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    for _ in range(2):
        assert torch.equal(model.generate(query, memory=state, **options), expected)
    assert len(model.base_model.prefix_cache) == 1
