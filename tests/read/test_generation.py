"""`generate` from memory, with everything that Transformers takes."""

import pytest
import torch
from reading import ROWS, Collect, greedy_without_cache, make, pad_left, pad_right
from tiny import ARCHITECTURES, tiny, tokens
from transformers import GenerationConfig


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_equals_argmax_without_a_cache(architecture):
    model = make(architecture)
    states = model.write(tokens(3, 9))
    ids, mask = pad_left(ROWS, 7)
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    output = model.generate(ids, memory=states, **kwargs)
    assert torch.equal(output[:, :7], ids)
    for i, row in enumerate(ROWS):
        expected = greedy_without_cache(model, states[i], row, 6)
        assert torch.equal(output[i, 7 - len(row) :], expected)
    without = model.generate(ids, **kwargs)
    assert not torch.equal(output, without)  # the memory matters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_generate_equals_the_same_call_on_real_tokens(architecture, options):
    """With the embeddings of real tokens as memory, generate must do what it does with those tokens as prompt."""
    model = make(architecture, num_control_tokens=0, memory_projection="none")
    hidden = tokens(1, 3, seed=7)
    with torch.no_grad():
        vectors = model.get_input_embeddings()(hidden)
        model.base_model.slots.gradmem_memory["default"].copy_(vectors[0])
    state = model.write(tokens(1, 4), steps=0)
    prompt = tokens(1, 4, seed=1)
    options = options | {"max_new_tokens": 5, "eos_token_id": None}
    torch.manual_seed(5)
    ours = model.generate(prompt, memory=state, **options)
    assert ours.shape == (options.get("num_return_sequences", 1), 9)
    torch.manual_seed(5)
    theirs = model.get_base_model().generate(torch.cat([hidden, prompt], dim=1), **options)
    assert torch.equal(ours[:, 4:], theirs[:, 7:])


def test_checkpointed_layers_in_training_mode_are_refused():
    """They drop their cache, and Transformers' `generate` continues silently."""
    model = make("llama")
    state, options = model.write(tokens(1, 9)), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens(1, 4), memory=state, **options)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"Call model\.eval\(\) first"):
        model.train().generate(tokens(1, 4), memory=state, **options)
    assert torch.equal(model.eval().generate(tokens(1, 4), memory=state, **options), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_turn_can_reuse_the_returned_cache(architecture):
    model = make(architecture)
    states = model.write(tokens(2, 9))
    ids, mask = pad_left([tokens(1, 5, seed=2)[0], tokens(1, 3, seed=3)[0]])
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    first = model.generate(ids, attention_mask=mask, memory=states, return_dict_in_generate=True, **options)
    turn = tokens(2, 3, seed=4)
    full = torch.cat([first.sequences, turn], dim=1)
    full_mask = torch.cat([mask, torch.ones(2, full.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    fresh = model.generate(full, attention_mask=full_mask, memory=states, **options)
    cached = model.generate(
        full, attention_mask=full_mask, memory=states, past_key_values=first.past_key_values, **options
    )
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_streamer_gets_prompt_and_new_tokens(architecture):
    class Ended(Collect):
        def end(self):
            self.pieces.append(None)

    model, streamer, prompt = make(architecture), Ended(), tokens(1, 4, seed=1)
    state = model.write(tokens(1, 9))
    output = model.generate(prompt, memory=state, max_new_tokens=5, eos_token_id=None, streamer=streamer)
    assert streamer.pieces[-1] is None
    assert torch.equal(torch.cat(streamer.pieces[:-1]), output[0])


@pytest.mark.parametrize("how", ["keyword", "config", "model"])
def test_max_and_min_length_count_prompt_and_new_tokens(how):
    model = make()
    state, prompt = model.write(tokens(1, 9)), tokens(1, 4, seed=1)
    lengths = {"max_length": 11, "min_length": 11}
    if how == "keyword":
        output = model.generate(prompt, memory=state, **lengths)
    elif how == "config":
        config = GenerationConfig(pad_token_id=0, eos_token_id=2, **lengths)
        output = model.generate(prompt, memory=state, generation_config=config)
        assert config.max_length == 11
    else:
        for name, value in lengths.items():
            setattr(model.get_base_model().generation_config, name, value)
        output = model.generate(prompt, memory=state)
        assert model.get_base_model().generation_config.max_length == 11
    assert output.shape == (1, 11)


def test_min_new_tokens_and_default_length():
    model = make()
    state, prompt = model.write(tokens(1, 9)), tokens(1, 4, seed=1)
    assert model.generate(prompt, memory=state, min_new_tokens=6, max_new_tokens=6).shape == (1, 10)
    assert model.generate(prompt, memory=state, eos_token_id=None).shape == (1, 24)  # Transformers' default of 20


def test_padding_is_inferred_without_a_mask_as_transformers_does():
    model = make()
    states = model.write(tokens(3, 9))
    ids, mask = pad_left(ROWS)
    options = {"memory": states, "max_new_tokens": 4, "eos_token_id": 2}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, attention_mask=mask, **options))


def test_static_cache_and_no_cache_give_the_same_text():
    model = make()
    state, prompt = model.write(tokens(1, 9)), tokens(1, 6, seed=1)
    options = {"memory": state, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", disable_compile=True, **options), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny()},
        {"prefill_chunk_size": 2},
        {"token_healing": True},
        {"cache_implementation": "paged"},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("how", ["keyword", "config"])
def test_decoding_that_would_lose_the_memory_is_refused(options, how):
    """With these and input embeddings, Transformers silently gives text that is not the model's."""
    model = make()
    state, name = model.write(tokens(1, 9)), next(iter(options))
    if how == "config" and name != "assistant_model":  # which is not a field of GenerationConfig
        options = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(NotImplementedError, match=f"cannot be combined with {name}"):
        model.generate(tokens(1, 6), memory=state, max_new_tokens=4, **options)
    assert model.generate(tokens(1, 6), memory=state, max_new_tokens=4, eos_token_id=None).shape == (1, 10)


def test_continuous_batching_with_memory_is_refused():
    model = make()
    with pytest.raises(NotImplementedError, match=r"Use generate\(memory=...\)"):
        model.generate_batch([[5, 6]], memory=model.write(tokens(1, 9)))


def test_unset_fields_of_a_passed_config_come_from_the_models():
    """As in Transformers: the pad token for the inferred mask, and options that are refused."""
    model = make()
    states = model.write(tokens(3, 9))
    ids, mask = pad_left(ROWS)
    config = GenerationConfig(max_new_tokens=4, eos_token_id=2)
    with_mask = model.generate(ids, memory=states, attention_mask=mask, generation_config=config)
    assert torch.equal(model.generate(ids, memory=states, generation_config=config), with_mask)
    model.get_base_model().generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens"):
        model.generate(ids[:1], memory=states[0], generation_config=config)


def test_the_second_positional_argument_is_the_generation_config():
    model, ids = make(), tokens(2, 5)
    for memory in (None, model.write(tokens(2, 9))):
        output = model.generate(ids, GenerationConfig(max_new_tokens=3, eos_token_id=[60]), memory=memory)
        assert torch.equal(output, model.generate(ids, memory=memory, max_new_tokens=3, eos_token_id=[60]))
        with pytest.raises(TypeError, match=r"generation_config must be a GenerationConfig .* got Tensor"):
            model.generate(ids, torch.ones_like(ids), memory=memory)


def test_right_padding_is_moved_to_the_left():
    """Tokenizers pad on the right by default, and new tokens would follow the padding."""
    model = make()
    states, options = model.write(tokens(3, 9)), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    (left, left_mask), (right, right_mask) = pad_left(ROWS, 7), pad_right(ROWS, 7)
    expected = model.generate(left, attention_mask=left_mask, memory=states, **options)
    assert torch.equal(model.generate(right, attention_mask=right_mask, memory=states, **options), expected)
    assert torch.equal(model.generate(right, memory=states, **options), expected)  # the mask is inferred
    cache = model.generate(left, memory=states, return_dict_in_generate=True, **options).past_key_values
    with pytest.raises(ValueError, match="cannot be padded on the right"):
        model.generate(right, attention_mask=right_mask, memory=states, past_key_values=cache, **options)


def test_per_token_arguments_other_than_the_default_are_refused():
    model = make()
    ids = tokens(2, 5)
    zeros, ones = torch.zeros_like(ids), torch.ones_like(ids)
    state = model.write(ids, token_type_ids=zeros)
    reads = (lambda **o: model(input_ids=ids, memory=state, **o), lambda **o: model.generate(ids, memory=state, **o))
    for read in reads:
        read(token_type_ids=zeros)
        for options in ({"token_type_ids": ones}, {"position_ids": ones}, {"mm_token_type_ids": ones}):
            with pytest.raises(ValueError, match=next(iter(options))):
                read(**options)
    for write in (lambda **o: model.write(ids, **o), lambda **o: model.fidelity(state, ids, **o)):
        with pytest.raises(ValueError, match="token_type_ids other than 0"):
            write(token_type_ids=ones)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("length", [{"max_new_tokens": 120}, {"max_length": 150}])
def test_an_answer_stops_at_the_last_position(architecture, length):
    """The model has 96. The last new token is not read and needs none."""
    model = make(architecture)
    state, prompt = model.write(tokens(1, 6)), tokens(1, 40)
    room = 96 + 1 - 40 - model.prefix_length
    with pytest.warns(UserWarning, match=f"end after {room} tokens instead of 1.0: the model has 96"):
        output = model.generate(prompt, memory=state, do_sample=False, eos_token_id=None, **length)
    assert output.shape[1] == 40 + room
    assert (
        output.shape[1]
        == model.generate(prompt, memory=state, do_sample=False, eos_token_id=None, max_new_tokens=room).shape[1]
    )
