"""READ as a forward pass: the equation, padding on either side, several queries and states."""

import pytest
import torch
from reading import ROWS, make, pad_left, pad_right
from tiny import ARCHITECTURES, VOCABULARY, tokens

from benchmarks import textbook
from gradmem_adapter import MemoryState
from gradmem_adapter.read.prefix import Layout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_matches_the_equation(architecture):
    model = make(architecture)
    state = model.write(tokens(1, 9))
    query = tokens(1, 5, seed=1)
    output = model(input_ids=query, labels=query, memory=state)
    prefix = model.prefix_embeddings(state)
    assert prefix.shape == (1, 3 + 2, state.width)
    expected = textbook.loss(model.get_base_model(), prefix, query)
    torch.testing.assert_close(output.loss, expected[0], rtol=1e-4, atol=1e-6)
    assert output.logits.shape == (1, 5, VOCABULARY)
    whole = torch.cat([prefix, model.get_input_embeddings()(query)], dim=1)
    torch.testing.assert_close(
        output.logits, model.get_base_model()(inputs_embeds=whole).logits[:, 5:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_batch_gives_the_same_as_single_queries(architecture, side):
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


def test_a_compiled_model_reads_left_padded_queries():
    """The first such batch triggers a trial of the backbone, which must not be compiled."""
    model = make()
    state, (ids, mask) = model.write(tokens(3, 9)), pad_left(ROWS)
    compiled = torch.compile(model, backend="eager")
    try:
        logits = compiled(input_ids=ids, attention_mask=mask, memory=state).logits
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(logits, model(input_ids=ids, attention_mask=mask, memory=state).logits)


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


def test_states_side_by_side_form_one_prefix():
    model = make(num_control_tokens=0, memory_projection="none")
    a, b = model.write(tokens(1, 9)), model.write(tokens(1, 9, seed=3))
    both = type(a).concat([a, b])
    query = tokens(1, 5, seed=1)
    prefix = torch.cat([model.prefix_embeddings(a), model.prefix_embeddings(b)], dim=1)
    assert torch.equal(model.prefix_embeddings(both), prefix)
    whole = torch.cat([prefix, model.get_input_embeddings()(query)], dim=1)
    expected = model.get_base_model()(inputs_embeds=whole).logits[:, 6:]
    torch.testing.assert_close(model(input_ids=query, memory=both).logits, expected, rtol=1e-4, atol=1e-5)


def test_one_pass_of_write_and_read_equals_two_calls():
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


def test_return_dict_false_and_logits_to_keep():
    model = make()
    state, query = model.write(tokens(1, 9)), tokens(1, 5, seed=1)
    full = model(input_ids=query, memory=state)
    assert torch.equal(model(input_ids=query, memory=state, return_dict=False)[0], full.logits)
    kept = model(input_ids=query, memory=state, logits_to_keep=2).logits
    torch.testing.assert_close(kept, full.logits[:, -2:])


def embeddings(*shape):
    return {"input_ids": None, "inputs_embeds": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory": "two"}, ValueError, "3 queries for 2 memory states"),
        ({"memory": torch.zeros(3, 3, 32)}, TypeError, "must be a MemoryState"),
        ({"memory": "other model"}, ValueError, "written by model .* but this is model"),
        ({"memory": "narrow"}, ValueError, "width 16, but the model's have width 32"),
        ({"memory": "one", "context_index": torch.tensor([0, 0, 1])}, ValueError, "must be between 0 and 0"),
        ({"memory": "one", "context_index": torch.tensor([0])}, ValueError, "for each query"),
        ({"memory": "one", "context_index": torch.tensor([True, False, False])}, ValueError, "of torch.bool"),
        ({"memory": "one", "context_input_ids": tokens(1, 4)}, ValueError, "not both"),
        ({"memory": "one", "input_ids": None}, ValueError, "not both or neither"),
        ({"memory": "one", "input_ids": tokens(1, 4) + 100}, ValueError, "the model knows 0 to"),
        ({"memory": "one", "position_ids": torch.arange(4)[None]}, ValueError, "position_ids cannot be combined"),
        ({"memory": "one", "labels": tokens(3, 3)}, ValueError, r"shape of the query, \(3, 4\), .* got \(3, 3\)"),
        ({"memory": "one", "labels": tokens(1, 4)}, ValueError, r"shape of the query, \(3, 4\), .* got \(1, 4\)"),
        (
            {"memory": "one", **embeddings(3, 4, 16)},
            ValueError,
            "must have width 32, as the model's embeddings, got 16",
        ),
        (
            {"memory": "one", **embeddings(4, 32)},
            ValueError,
            r"must have shape \[batch, length, width\], got \(4, 32\)",
        ),
        (
            {"memory": "one", **embeddings(3, 4, 32), "attention_mask": torch.ones(3, 5)},
            ValueError,
            r"need an attention mask \(3, 4\), got \(3, 5\)",
        ),
        ({"context_index": torch.tensor([0])}, ValueError, "need a memory"),
        ({"max_targets": 2}, ValueError, "need a memory"),
        ({"write_steps": 2}, ValueError, "write_steps applies to a context that is written in this pass"),
        (
            {"memory": "one", "write_steps": 2},
            ValueError,
            "write_steps applies to a context that is written in this pass",
        ),
        (
            {"context_input_ids": tokens(3, 4), "write_steps": -1},
            ValueError,
            "write_steps must be a non-negative integer, got -1",
        ),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_state_is_refused_everywhere(value):
    model, ids = make(), tokens(2, 5)
    states = model.write(ids)
    states.vectors[1, 0, 0] = value
    for read in (
        lambda **o: model(input_ids=ids, memory=states, **o),
        lambda **o: model.generate(ids, memory=states, **o),
        lambda **o: model.log_likelihood(ids.tolist(), ids.tolist(), states, **o),
        lambda **o: model.prefix_embeddings(states, **o),
        lambda **o: model.reconstruct(states, **o),
        lambda **o: model.fidelity(states, ids, **o),
        lambda **o: model.write(ids, initial=states, **o),
        lambda **o: model.update(states, ids, **o),
    ):
        for options in ({}, {"strict": False}):
            with pytest.raises(ValueError, match="not finite, because WRITE diverged"):
                read(**options)
    model.prefix_embeddings(states[0])


@pytest.mark.parametrize("keep", [2, 5, 7, -2, [2], [1, 3], [-1, 0], [True, False, True, False, True]])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_to_keep_counts_query_positions_only(keep, padded):
    model, query, mask = make(), tokens(2, 5, seed=1), torch.ones(2, 5, dtype=torch.long)
    keep = torch.tensor(keep) if isinstance(keep, list) else keep
    mask[0, :2] = 0 if padded else 1
    state = model.write(tokens(2, 9))
    full = model(query, mask, memory=state).logits
    kept = model(query, mask, memory=state, logits_to_keep=keep).logits
    assert kept.shape == model(query, mask, logits_to_keep=keep).logits.shape
    torch.testing.assert_close(kept, full[:, slice(-keep, None) if isinstance(keep, int) else keep])


def test_logits_to_keep_can_differ_per_row():
    """Transformers takes such tensors from 5.23 on."""
    model, query = make(), tokens(2, 5, seed=1)
    places, mask = torch.tensor([[0, 4], [1, 2]]), torch.tensor([[1, 0, 0, 0, 1], [0, 1, 1, 1, 0]]).bool()
    try:
        model(query, logits_to_keep=places)
    except (IndexError, RuntimeError):
        pytest.skip("not in this version of Transformers")
    state = model.write(tokens(2, 9))
    full = model(query, memory=state).logits
    kept = model(query, memory=state, logits_to_keep=places).logits
    torch.testing.assert_close(kept, torch.take_along_dim(full, places[..., None], dim=1))
    torch.testing.assert_close(model(query, memory=state, logits_to_keep=mask).logits, full[mask])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits_to_keep": torch.tensor([5])}, IndexError, "index 5 is out of bounds"),
        (
            {"logits_to_keep": "2"},
            TypeError,
            "logits_to_keep must be a number of positions or a tensor of their indices",
        ),
        ({"logits_to_keep": 2, "labels": tokens(2, 5)}, ValueError, "cannot be combined with labels or max_targets"),
    ],
)
def test_invalid_logits_to_keep_is_refused(options, error, message):
    model = make()
    with pytest.raises(error, match=message):
        model(tokens(2, 5), memory=model.write(tokens(2, 9)), **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_and_attentions_cover_the_query_only(architecture):
    model = make(architecture)
    backbone = model.get_base_model()
    backbone.set_attn_implementation("eager")
    state, (ids, mask) = model.write(tokens(3, 9)), pad_left(ROWS)
    options = {"output_hidden_states": True, "output_attentions": True}
    whole = torch.cat([model.prefix_embeddings(state), model.get_input_embeddings()(ids)], dim=1)
    expected = backbone(inputs_embeds=whole, **options)
    for extra in ({}, {"labels": ids, "max_targets": ids.shape[1]}):
        output = model(ids, memory=state, **options, **extra)
        for found, all_of_it in zip(output.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(found, all_of_it[:, 5:], rtol=1e-4, atol=1e-5)
        for found, all_of_it in zip(output.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(found, all_of_it[:, :, 5:], rtol=1e-4, atol=1e-5)
    padded = model(ids, mask, memory=state, **options)
    for i, row in enumerate(ROWS):
        alone = model(row[None], memory=state[i], **options)
        for found, by_itself in zip(padded.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(found[i][mask[i] == 1], by_itself[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generate_returns_outputs_shaped_as_without_memory(options):
    model, ids = make(), tokens(2, 5, seed=1)
    model.get_base_model().set_attn_implementation("eager")
    options = {
        **options, "max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True,
        "output_hidden_states": True, "output_attentions": True,
    }  # fmt: skip
    output, plain = model.generate(ids, memory=model.write(tokens(2, 9)), **options), model.generate(ids, **options)
    for name in ("hidden_states", "attentions"):
        places = [[[part.shape[-2] for part in step] for step in found[name]] for found in (output, plain)]
        assert places[0] == places[1]


def test_router_logits_cover_the_query_only():
    model, ids = make("mixtral"), tokens(2, 5)
    state = model.write(tokens(2, 9))
    whole = torch.cat([model.prefix_embeddings(state), model.get_input_embeddings()(ids)], dim=1)
    expected = model.get_base_model()(inputs_embeds=whole, output_router_logits=True)
    output = model(ids, memory=state, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    for found, all_of_it in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(found, all_of_it.unflatten(0, (2, 10))[:, 5:].flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 8, 6), (2, 5, 6)), ((4, 2, 8, 6), (4, 2, 5, 6)), ((2, 8, 4, 6), (2, 5, 4, 6))]
)
def test_hidden_states_of_several_streams(shape, expected):
    """As Gemma 3n and models with hyper-connections have them."""
    (found,) = Layout(3, 5).split_outputs({"hidden_states": (torch.zeros(shape),)})["hidden_states"]
    assert found.shape == expected
