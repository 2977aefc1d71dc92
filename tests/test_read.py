"""READ: forward, generate with everything Transformers takes, prefix embeddings, reconstruct and fidelity."""

import pytest
import textbook
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, VOCABULARY, tiny, tokens
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gradmem_adapter import GradMemConfig, MemoryState


def make(architecture="llama", **config):
    """A model whose memory matters: control vectors, projection and slots of the size of its embeddings."""
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "num_control_tokens": 1, "memory_projection": "shared"}
    backbone = tiny(architecture)
    scale = float(backbone.get_input_embeddings()(torch.arange(3, 20)).std())
    return get_peft_model(backbone, GradMemConfig(memory_init_std=scale, **defaults | config)).eval()


def pad_left(rows, length=None):
    length = length or max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])


def pad_right(rows, length):
    ids = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (0, length - len(row))) for row in rows])


def greedy_without_cache(model, state, prompt, count):
    """Step-by-step argmax over whole forward passes."""
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, memory=state).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0]


ROWS = [tokens(1, n, seed=n)[0] for n in (6, 2, 4)]


@pytest.mark.parametrize("trained", ["lora", "backbone"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_of_the_targets_alone_is_the_loss(architecture, trained):
    """With padding on both sides; the head is trained with the backbone, and not with a LoRA."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if trained == "lora" else None
    model = make(architecture, lora_config=lora, train_backbone=trained == "backbone")
    ids, mask = (torch.cat(parts) for parts in zip(pad_left(ROWS, 7), pad_right(ROWS, 7), strict=True))
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 1:5] = labels[4, 0] = labels[3, 2:] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "context_input_ids": tokens(1, 9)}
    whole = model(**inputs, context_index=torch.zeros(6, dtype=torch.long))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(whole.loss, [model.get_parameter(n) for n in names], allow_unused=True)
    alone = model(**inputs, context_index=torch.zeros(6, dtype=torch.long), max_targets=6)
    gradients = torch.autograd.grad(alone.loss, [model.get_parameter(n) for n in names], allow_unused=True)
    torch.testing.assert_close(alone.loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert alone.logits is None
    for name, gradient, other in zip(names, gradients, expected, strict=True):
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def test_rows_are_correct_if_every_target_is_the_first_choice():
    model = make()
    state = model.write(tokens(1, 9))
    ids = tokens(1, 3).repeat(3, 1)
    ids[:, 1:] = greedy_without_cache(model, state, ids[0, :1], 2)[1:]
    ids[1, 2] = (ids[1, 2] - 2) % (VOCABULARY - 3) + 3
    labels = ids.clone()
    labels[:, 0] = labels[2, 2] = -100
    ids[2, 2] = ids[1, 2]
    assert model(input_ids=ids, labels=labels, memory=state, max_targets=2).correct.tolist() == [True, False, True]


def test_targets_that_would_be_left_out_are_refused():
    model = make()
    state, query = model.write(tokens(1, 9)), tokens(2, 4)
    with pytest.raises(ValueError, match="max_targets is 3, and a query has 4 labels"):
        model(input_ids=query, labels=query, memory=state, max_targets=3)
    with pytest.raises(ValueError, match="needs labels"):
        model(input_ids=query, memory=state, max_targets=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_equals_the_equation(architecture):
    model = make(architecture)
    state = model.write(tokens(1, 9))
    query = tokens(1, 5, seed=1)
    output = model(input_ids=query, labels=query, memory=state)
    prefix = model.prefix_embeddings(state)
    assert prefix.shape == (1, 3 + 2, state.width)
    expected = textbook.read_loss(model.get_base_model(), prefix[0], query[0], query[0])
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-6)
    assert output.logits.shape == (1, 5, VOCABULARY)
    whole = torch.cat([prefix, model.get_input_embeddings()(query)], dim=1)
    torch.testing.assert_close(
        output.logits, model.get_base_model()(inputs_embeds=whole).logits[:, 5:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_of_a_padded_batch_equals_one_by_one(architecture, side):
    model = make(architecture)
    state = model.write(tokens(3, 9))
    ids, mask = pad_left(ROWS, 8) if side == "left" else pad_right(ROWS, 8)
    labels = ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels, memory=state)
    losses = []
    for i, row in enumerate(ROWS):
        alone = model(input_ids=row[None], labels=row[None], memory=state[i])
        torch.testing.assert_close(output.logits[i][mask[i] == 1], alone.logits[0], rtol=1e-3, atol=1e-4)
        losses.append(alone.loss * len(row))
    torch.testing.assert_close(output.loss, sum(losses) / sum(map(len, ROWS)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_equals_argmax_without_cache(architecture):
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_turn_on_the_returned_cache(architecture):
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
def test_streamer_gets_prompt_and_new_tokens(architecture):
    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten())

        def end(self):
            self.pieces.append(None)

    model, streamer, prompt = make(architecture), Collect(), tokens(1, 4, seed=1)
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
    [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny()}, {"prefill_chunk_size": 2}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("how", ["keyword", "config"])
def test_decoding_that_would_lose_the_memory_is_refused(options, how):
    """Transformers gives other text than the model's with these and input embeddings, without an error."""
    model = make()
    state, name = model.write(tokens(1, 9)), next(iter(options))
    if how == "config" and name != "assistant_model":  # which is no field of a GenerationConfig
        options = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(NotImplementedError, match=f"cannot be combined with {name}"):
        model.generate(tokens(1, 6), memory=state, max_new_tokens=4, **options)
    assert model.generate(tokens(1, 6), memory=state, max_new_tokens=4, eos_token_id=None).shape == (1, 10)


def test_one_state_for_all_queries_and_context_index():
    model = make()
    states = model.write(tokens(2, 9))
    query = tokens(4, 5, seed=1)
    index = torch.tensor([1, 0, 0, 1])
    by_index = model(input_ids=query, memory=states, context_index=index).logits
    torch.testing.assert_close(by_index, model(input_ids=query, memory=states[index]).logits)
    one = model(input_ids=query, memory=states[0]).logits
    torch.testing.assert_close(one[1:3], by_index[1:3])
    generated = model.generate(query, memory=states, context_index=index, max_new_tokens=3)
    assert torch.equal(generated, model.generate(query, memory=states[index], max_new_tokens=3))


def test_a_query_reads_several_states_side_by_side():
    model = make()
    states, query = model.write(tokens(3, 9)), tokens(2, 4)
    index = torch.tensor([[2, 0], [1, 1]])
    side_by_side = MemoryState.concat([states[[2, 1]], states[[0, 1]]])
    expected = model(input_ids=query, memory=side_by_side).logits
    torch.testing.assert_close(model(input_ids=query, memory=states, context_index=index).logits, expected)
    generated = model.generate(query, memory=states, context_index=index, max_new_tokens=3)
    assert torch.equal(generated, model.generate(query, memory=side_by_side, max_new_tokens=3))
    written = model(input_ids=query, context_input_ids=tokens(3, 9), context_index=index).logits
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-5)


def test_write_and_read_in_one_pass_equal_two():
    model = make()
    context, query = tokens(2, 9), tokens(3, 5, seed=1)
    index = torch.tensor([0, 1, 1])
    inputs = {"input_ids": query, "labels": query, "context_index": index}
    one = model(context_input_ids=context, **inputs)
    state = model.write(context)
    two = model(memory=state, **inputs)
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.target_loss, two.loss)
    torch.testing.assert_close(one.memory, state.vectors)
    torch.testing.assert_close(one.write_losses, state.write_losses[:, :-1])
    with torch.no_grad():
        evaluated = model(context_input_ids=context, **inputs)
    torch.testing.assert_close(evaluated.loss, one.loss)
    three = model(context_input_ids=context, write_steps=3, **inputs)
    assert three.write_losses.shape == (2, 3)
    zero = model(context_input_ids=context, write_steps=0, **inputs)
    torch.testing.assert_close(zero.memory[0], model.base_model.slots.gradmem_memory["default"])


def test_training_through_write_lowers_the_outer_loss():
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, lora_config=LoraConfig(r=4, target_modules="all-linear"))
    model = get_peft_model(tiny(scale=2.0), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    context = tokens(4, 6)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=context, labels=context, context_input_ids=context).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_without_memory_it_is_the_backbone():
    model = make()
    query = tokens(2, 5, seed=1)
    torch.testing.assert_close(model(input_ids=query).logits, model.get_base_model()(input_ids=query).logits)


def test_states_read_side_by_side():
    model = make(num_control_tokens=0, memory_projection="none")
    a, b = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    both = type(a).concat([a, b])
    query = tokens(1, 5, seed=1)
    prefix = torch.cat([model.prefix_embeddings(a), model.prefix_embeddings(b)], dim=1)
    assert torch.equal(model.prefix_embeddings(both), prefix)
    whole = torch.cat([prefix, model.get_input_embeddings()(query)], dim=1)
    expected = model.get_base_model()(inputs_embeds=whole).logits[:, 6:]
    torch.testing.assert_close(model(input_ids=query, memory=both).logits, expected, rtol=1e-4, atol=1e-5)


def test_return_dict_false_and_logits_to_keep():
    model = make()
    state, query = model.write(tokens(1, 9)), tokens(1, 5, seed=1)
    full = model(input_ids=query, memory=state)
    assert torch.equal(model(input_ids=query, memory=state, return_dict=False)[0], full.logits)
    kept = model(input_ids=query, memory=state, logits_to_keep=2).logits
    torch.testing.assert_close(kept, full.logits[:, -2:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory": "two"}, ValueError, "3 queries for 2 memory states"),
        ({"memory": torch.zeros(3, 3, 32)}, TypeError, "must be a MemoryState"),
        ({"memory": "other model"}, ValueError, "written by model .* and this is model"),
        ({"memory": "narrow"}, ValueError, "width 16, the model's are 32 wide"),
        ({"memory": "one", "context_index": torch.tensor([0, 0, 1])}, ValueError, "must lie in 0 to 0"),
        ({"memory": "one", "context_index": torch.tensor([0])}, ValueError, "one integer per query"),
        ({"memory": "one", "context_input_ids": tokens(1, 4)}, ValueError, "not both"),
        ({"memory": "one", "input_ids": None}, ValueError, "one of the two"),
        ({"memory": "one", "input_ids": tokens(1, 4) + 100}, ValueError, "the model knows 0 to"),
        ({"memory": "one", "position_ids": torch.arange(4)[None]}, ValueError, "position_ids cannot be combined"),
        ({"context_index": torch.tensor([0])}, ValueError, "need a memory"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    model = make()
    one = model.write(tokens(1, 9))
    named = {
        "one": one,
        "two": model.write(tokens(2, 9)),
        "other model": make(num_control_tokens=0).write(tokens(1, 9)),
        "narrow": type(one)(one.vectors[..., :16], one.context_tokens, one.write_losses, one.fingerprint),
    }
    arguments = {"input_ids": tokens(3, 4)} | arguments
    if isinstance(arguments.get("memory"), str):
        arguments["memory"] = named[arguments["memory"]]
    with pytest.raises(error, match=message):
        model(**arguments)


def test_strict_false_reads_a_state_of_another_model():
    model, other = make(), make(num_control_tokens=0)
    state = other.write(tokens(1, 9))
    query = tokens(1, 4)
    assert model(input_ids=query, memory=state, strict=False).logits.isfinite().all()
    with pytest.raises(ValueError, match="strict=False"):
        model.generate(query, memory=state)
    assert model.generate(query, memory=state, strict=False, max_new_tokens=2).shape == (1, 6)


@pytest.mark.parametrize("write_head", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reconstruct_equals_argmax_of_the_write_model(architecture, write_head):
    """Greedy decoding from memory by its definition: one whole pass of the WRITE model per token."""
    model = make(architecture, write_head=write_head)
    context = tokens(2, 5)
    state = model.write(context, steps=4)
    got = model.reconstruct(state, 5)
    writer = model.base_model._writer
    for i in range(2):
        prefix = writer.slots.prefix(state.vectors[i : i + 1], "write", "default")
        ids = torch.zeros(1, 0, dtype=torch.long)
        for _ in range(5):
            whole = torch.cat([prefix, model.get_input_embeddings()(ids)], dim=1)
            if write_head:
                hidden = model.get_base_model().base_model(inputs_embeds=whole).last_hidden_state
                logits = model.base_model.slots.gradmem_write_head["default"](hidden)
            else:
                logits = model.get_base_model()(inputs_embeds=whole).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(got[i], ids[0])
    fidelity = model.fidelity(state, context)
    torch.testing.assert_close(fidelity.greedy, (got == context).float().mean(1))


def test_fidelity_counts_real_tokens_of_padded_contexts():
    model = make()
    ids, mask = pad_left([tokens(1, 5)[0], tokens(1, 3, seed=2)[0]])
    state = model.write(ids, mask)
    together = model.fidelity(state, ids, mask)
    alone = model.fidelity(state[1], tokens(1, 3, seed=2))
    torch.testing.assert_close(together.greedy[1], alone.greedy[0])
    torch.testing.assert_close(together.teacher_forced[1], alone.teacher_forced[0])
    with pytest.raises(ValueError, match="2 contexts for 1 states"):
        model.fidelity(state[0], ids, mask)


def test_what_a_passed_configuration_leaves_open_comes_from_the_models():
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


def test_a_backbone_whose_fused_loss_keeps_no_logits(monkeypatch):
    """As Liger's does in training."""
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2))
    ids = tokens(2, 6)
    inputs = {"input_ids": ids, "labels": ids, "context_input_ids": ids}
    expected = model(**inputs)
    forward = type(model.get_base_model()).forward

    def without_logits(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None:
            output.logits = None
        return output

    monkeypatch.setattr(type(model.get_base_model()), "forward", without_logits)
    output = model(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)
