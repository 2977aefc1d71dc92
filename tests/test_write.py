"""WRITE: batches, padding, options, early stops, bad input, and that nothing else changes."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, VOCABULARY, tiny, tokens

import gradmem_adapter.ops.cross_entropy
from benchmarks import textbook
from gradmem_adapter import GradMemConfig
from gradmem_adapter.layer import START_GAIN
from gradmem_adapter.utils.capture import static_shapes
from gradmem_adapter.write.context import Context


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


def padded(rows, side, length=None):
    """[B, N] ids and mask of token lists, padded with 0."""
    length = length or max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_equation(architecture):
    model = make(architecture)
    context = tokens(1, 11)
    state = model.write(context)
    slots = model.base_model.slots.gradmem_memory["default"].detach()
    backbone = model.get_base_model()
    expected = textbook.write(backbone, slots, context, 2, 0.3).detach()
    torch.testing.assert_close(state.vectors, expected, rtol=1e-4, atol=1e-6)
    for k, loss in enumerate(state.write_losses[0]):
        memory = textbook.write(backbone, slots, context, k, 0.3).detach()
        torch.testing.assert_close(loss[None], textbook.loss(backbone, memory, context).detach())
    assert state.context_tokens.tolist() == [11]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alone_equals_in_a_padded_batch(architecture, side):
    model = make(architecture)
    rows = [tokens(1, n, seed=n)[0] for n in (17, 4, 9)]
    together = model.write(*padded(rows, side, length=20))
    for i, row in enumerate(rows):
        alone = model.write(row[None])
        torch.testing.assert_close(together.vectors[i], alone.vectors[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.write_losses[i], alone.write_losses[0], rtol=1e-5, atol=1e-6)
        assert together.context_tokens[i] == len(row)


@pytest.mark.parametrize("start", ["context", "pooled_context"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_starting_from_the_context_equals_the_equation(architecture, start):
    model = make(architecture, start=start)
    slots = model.base_model.slots
    assert (slots.gradmem_start_gain["default"] == START_GAIN).all()
    rows = [tokens(1, n, seed=n)[0] for n in (7, 2)]
    batch = padded(rows, "left")
    with torch.no_grad():
        gain = slots.gradmem_start_gain["default"].normal_()
        if start == "pooled_context":
            assert (slots.gradmem_pool_gain["default"] == 1).all()
            pool_gain = slots.gradmem_pool_gain["default"].normal_()
    state = model.write(*batch, steps=0)
    for vectors, row in zip(state.vectors, rows, strict=True):
        slot = slots.gradmem_memory["default"].detach()
        embeddings = model.get_input_embeddings()(row)
        # Three vectors: parts of 3, 2 and 2 tokens of seven; of two tokens each has a vector.
        parts = (slice(0, 3), slice(3, 5), slice(5, 7)) if len(row) == 7 else (slice(0, 1), slice(1, 2), slice(0))

        def means(values, parts=parts):
            return torch.stack([values[part].sum(0) / max(1, len(values[part])) for part in parts])

        if start == "pooled_context":
            slot = slot + pool_gain * means(embeddings)
        tokens_in = torch.cat([embeddings, slot])
        hidden = model.get_base_model().base_model(inputs_embeds=tokens_in[None]).last_hidden_state[0]
        torch.testing.assert_close(vectors, (slot + gain * hidden[len(row) :]).detach(), rtol=1e-4, atol=1e-5)
    on = model.write(*batch, initial=state, steps=2)
    torch.testing.assert_close(model.write(*batch).vectors, on.vectors, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_any_lengths_on_any_side(lengths, side, steps):
    model = _shared()
    rows = [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    state = model.write(*padded(rows, side), steps=steps)
    assert state.vectors.shape == (len(rows), 3, 32)
    assert state.write_losses.shape == (len(rows), steps + 1)
    assert state.context_tokens.tolist() == lengths
    last = model.write(rows[-1][None], steps=steps)
    torch.testing.assert_close(state.vectors[-1], last.vectors[0], rtol=1e-4, atol=1e-6)


def _shared(cache=[]):  # noqa: B006 - made once for all of hypothesis' examples
    if not cache:
        cache.append(make())
    return cache[0]


def test_padding_inside_a_context_is_skipped():
    model = make()
    ids = torch.tensor([[0, 5, 0, 6, 7, 0]])
    state = model.write(ids, torch.tensor([[0, 1, 0, 1, 1, 0]]))
    torch.testing.assert_close(state.vectors, model.write(torch.tensor([[5, 6, 7]])).vectors)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_more_steps_lower_the_loss(optimizer):
    model = make()
    state = model.write(tokens(3, 12), steps=30, lr={"sgd": 0.05, "adam": 0.02}[optimizer], optimizer=optimizer)
    assert (state.write_losses[:, -1] < 0.92 * state.write_losses[:, 0]).all()


def test_adam_equals_torch():
    model = make(write_optimizer="adam")
    context = tokens(1, 9)
    memory = model.base_model.slots.gradmem_memory["default"].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([memory], lr=0.05, eps=1e-8)
    for _ in range(4):
        optimizer.zero_grad()
        memory.grad = torch.autograd.grad(textbook.loss(model.get_base_model(), memory[None], context), memory)[0]
        optimizer.step()
    state = model.write(context, steps=4, lr=0.05)
    torch.testing.assert_close(state.vectors[0], memory.detach(), rtol=1e-3, atol=1e-5)


def test_each_of_the_first_steps_has_its_learned_rate_and_later_steps_the_last():
    model, context = make(learn_write_lr="scalar", num_write_lrs=2), tokens(2, 9)
    with torch.no_grad():
        model.base_model.slots.gradmem_log_write_lr["default"].copy_(torch.tensor([0.5, 0.1]).log())
    state = model.write(context, steps=1, lr=0.5)
    state = model.write(context, steps=2, lr=0.1, initial=state)
    torch.testing.assert_close(model.write(context, steps=3).vectors, state.vectors)
    with torch.no_grad():
        output = model(input_ids=context, context_input_ids=context, write_steps=3)
    torch.testing.assert_close(output.memory, state.vectors)
    first = model.write(context, steps=1)
    torch.testing.assert_close(model.write(context, steps=2, initial=first).vectors, state.vectors)


@pytest.mark.parametrize("kind", ["scalar", "per_element"])
def test_steps_have_factors_counted_from_the_end_and_go_on_as_they_ended(kind):
    model, context = make(learn_write_lr=kind, num_write_lrs=2, write_lr_from_end=True), tokens(2, 9)
    slots = model.base_model.slots
    shape = (2, 1, 1) if kind == "per_element" else (2,)
    with torch.no_grad():
        slots.gradmem_log_write_lr["default"].copy_(torch.tensor([0.5, 0.1]).log().view(shape))
        slots.gradmem_log_write_lr_end["default"].copy_(torch.tensor([0.2, 3.0]).log().view(shape))
    last = 0.1 * 0.2
    for rates in ([0.5 * 0.2], [0.5 * 3, last], [0.5 * 3, last, last, last]):
        state = model.write(context, steps=0)
        for rate in rates:
            state = model.write(context, steps=1, lr=rate, initial=state)
        torch.testing.assert_close(model.write(context, steps=len(rates)).vectors, state.vectors)
        with torch.no_grad():
            output = model(input_ids=context, context_input_ids=context, write_steps=len(rates))
        torch.testing.assert_close(output.memory, state.vectors)
    # Going on from a memory is going on after the last step.
    torch.testing.assert_close(
        model.write(context, steps=2, initial=model.write(context, steps=2)).vectors,
        model.write(context, steps=4).vectors,
    )


def test_a_learned_rate_for_each_element():
    model, context = make(learn_write_lr="per_element"), tokens(2, 9)
    before = model.write(context, steps=0).vectors
    whole = model.write(context, steps=1).vectors
    with torch.no_grad():
        model.base_model.slots.gradmem_log_write_lr["default"][0, 1, 2] += math.log(2)
    expected = whole.clone()
    expected[:, 1, 2] += (whole - before)[:, 1, 2]
    torch.testing.assert_close(model.write(context, steps=1).vectors, expected)


def test_the_last_loss_can_be_spared():
    model, context, seen = make(), tokens(2, 9), []
    whole = model.write(context, steps=3)
    state = model.write(context, steps=3, last_loss=False, callback=seen.append)
    assert torch.equal(state.vectors, whole.vectors)
    assert torch.equal(state.write_losses[:, :-1], whole.write_losses[:, :-1])
    assert state.write_losses[:, -1].isnan().all()
    assert len(seen) == 3
    with pytest.raises(ValueError, match="tolerance needs the loss after the last step"):
        model.write(context, last_loss=False, tolerance=0.1)


def test_without_a_last_loss_a_last_step_that_is_not_finite_is_not_kept():
    model, context = make(), tokens(2, 9)
    with pytest.warns(RuntimeWarning, match="sample 0, 1 is not finite after 1 steps"):
        state = model.write(context, steps=1, lr=3e38, last_loss=False)
    assert torch.equal(state.vectors, model.write(context, steps=0).vectors)


def test_shapes_do_not_follow_from_values_where_a_graph_will_be_captured():
    ids, mask = tokens(2, 9), torch.tensor([[1] * 5 + [0] * 4] * 2)
    assert Context.from_tokens(ids, mask, tiny(), 3).input_ids.shape == (2, 5)
    with static_shapes():
        context = Context.from_tokens(ids, mask, tiny(), 3)
    assert context.input_ids.shape == (2, 9)
    assert context.lengths.tolist() == [5, 5]


def test_going_on_from_a_state_equals_writing_longer():
    model = make()
    context = tokens(2, 12)
    first = model.write(context, steps=2)
    torch.testing.assert_close(
        model.write(context, steps=3, initial=first).vectors, model.write(context, steps=5).vectors
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model = make()
    expected = model.write(tokens(2, 8))
    with mode():
        state = model.write(tokens(2, 8))
        again = model.write(tokens(2, 8), initial=state)
    assert torch.equal(state.vectors, expected.vectors)
    assert not state.vectors.requires_grad
    assert again.write_losses[0, 0] == pytest.approx(state.write_losses[0, -1].item(), rel=1e-5)


def test_leaves_everything_as_it_was():
    model = make(lora_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), lora_phase="write")
    before = {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    random, training = torch.get_rng_state(), model.training
    config = str(model.get_base_model().config)
    model.write(tokens(2, 8))
    for name, parameter in model.named_parameters():
        value, requires_grad, grad = before[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad is None
    assert torch.equal(random, torch.get_rng_state())
    assert model.training == training
    assert torch.is_grad_enabled()
    assert str(model.get_base_model().config) == config


def test_logits_are_never_held_whole(monkeypatch):
    """With a small budget the head sees a few positions at a time, and the result is the same."""
    model = make(write_head=True)
    expected = model.write(tokens(2, 40))
    seen = []
    head = model.base_model.slots.gradmem_write_head["default"]
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    monkeypatch.setattr(gradmem_adapter.ops.cross_entropy, "MAX_LOGITS", 2 * 7 * VOCABULARY)
    state = model.write(tokens(2, 40))
    assert max(seen) <= 2 * 7 * VOCABULARY
    torch.testing.assert_close(state.vectors, expected.vectors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.write_losses, expected.write_losses)


def test_chunked_cross_entropy_has_the_same_meta_gradient(monkeypatch):
    def gradient():
        model = make(train_backbone=True)
        ids = tokens(2, 20)
        model(input_ids=ids[:, :4], labels=ids[:, :4], context_input_ids=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradient()
    monkeypatch.setattr(gradmem_adapter.ops.cross_entropy, "MAX_LOGITS", 2 * 7 * VOCABULARY)
    for name, value in gradient().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_tolerance_stops_each_sample_by_itself_at_its_best():
    model = make()
    context = tokens(3, 10)
    free = model.write(context, steps=40, lr=0.05)
    state = model.write(context, steps=40, lr=0.05, tolerance=0.02)
    assert (state.write_losses[:, -1] == state.write_losses.min(1).values).all()
    for i in range(3):
        losses = free.write_losses[i]
        falls = (losses[1:] > losses[:-1] * 0.98).nonzero()
        stop = int(falls[0]) + 1 if len(falls) else 40
        best = min(losses[stop], losses[stop - 1])
        assert state.write_losses[i, -1].item() == pytest.approx(best.item(), rel=1e-4)


def test_first_choices_are_counted_only_when_asked_for(monkeypatch):
    model, context, counted = make(), tokens(2, 9), []

    count = gradmem_adapter.ops.cross_entropy.correct_tokens

    def counting(*args):
        counted.append(args)
        return count(*args)

    monkeypatch.setattr(gradmem_adapter.ops.cross_entropy, "correct_tokens", counting)
    plain = model.write(context)
    assert not counted
    watched = model.write(context, callback=lambda progress: None)
    assert len(counted) == model.active_peft_config.write_steps + 1
    assert torch.equal(watched.vectors, plain.vectors)
    assert torch.equal(watched.write_losses, plain.write_losses)


def test_stops_when_every_token_is_recovered():
    model = get_peft_model(tiny(scale=12.0), GradMemConfig(num_memory_tokens=6))
    seen = []
    context = tokens(2, 3)
    state = model.write(context, steps=400, lr=0.1, optimizer="adam", stop_when_recovered=True, callback=seen.append)
    assert len(seen) < 400
    assert seen[-1].recovered.tolist() == [1, 1]
    assert state.write_losses.shape[1] == len(seen)
    assert model.fidelity(state, context).teacher_forced.tolist() == [1, 1]
    assert model.fidelity(state, context).greedy.tolist() == [1, 1]
    assert torch.equal(model.reconstruct(state), context)


def test_callback_is_told_each_step():
    seen = []
    state = make().write(tokens(2, 6), steps=3, callback=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(k, 3) for k in range(4)]
    assert torch.equal(torch.stack([p.losses for p in seen], 1), state.write_losses)


def test_a_sample_that_diverges_keeps_its_last_finite_memory():
    model = make()
    good, context = tokens(1, 8, seed=1), tokens(2, 8, seed=1)
    poison = model.get_base_model().get_input_embeddings()
    token = int(context[1, 3])
    assert token not in good
    with torch.no_grad():
        poison.weight[token] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"sample 1 is not finite after 0 steps"):
        state = model.write(context)
    assert state.vectors.isfinite().all()
    assert torch.equal(state.vectors[1], model.base_model.slots.gradmem_memory["default"])
    torch.testing.assert_close(state.vectors[0], model.write(good).vectors[0], rtol=1e-4, atol=1e-6)


def test_divergence_names_the_step_and_keeps_the_memory_before():
    model = make()
    context = tokens(2, 8)
    with pytest.warns(RuntimeWarning, match=r"sample 0, 1 is not finite after 2 steps"):
        state = model.write(context, lr=1e38, steps=5)
    assert torch.equal(state.vectors, model.write(context, lr=1e38, steps=1).vectors)
    assert state.write_losses.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, ValueError, "batch size 0"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "Context 0, 1 is empty"),
        (
            {"input_ids": tokens(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            ValueError,
            "Context 1 is empty",
        ),
        ({"input_ids": tokens(1, 94)}, ValueError, "has 94 tokens, and at most 93 are allowed"),
        ({"input_ids": torch.tensor([[3, VOCABULARY]])}, ValueError, f"from 3 to {VOCABULARY}; the model knows 0 to"),
        ({"input_ids": torch.tensor([[-1, 3]])}, ValueError, "from -1 to 3"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 4)}, ValueError, "different shapes"),
        ({"input_ids": tokens(1, 3)[0]}, ValueError, r"shape \[batch, length\]"),
        ({"input_ids": tokens(1, 3).float()}, TypeError, "integer token ids"),
        ({"input_ids": [[1, 2]]}, TypeError, "must be a tensor"),
        ({"input_ids": tokens(1, 3), "steps": -1}, ValueError, "steps must be"),
        ({"input_ids": tokens(1, 3), "lr": 0.0}, ValueError, "lr must be"),
        ({"input_ids": tokens(1, 3), "lr": float("nan")}, ValueError, "lr must be"),
        ({"input_ids": tokens(1, 3), "optimizer": "lion"}, ValueError, "optimizer must be"),
        ({"input_ids": tokens(1, 3), "tolerance": 2.0}, ValueError, "tolerance must be"),
        ({"input_ids": tokens(1, 3), "step": 3}, TypeError, "unexpected keyword argument 'step'"),
        ({"input_ids": tokens(1, 3), "initial": torch.zeros(1, 3, 32)}, TypeError, "must be a MemoryState"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make().write(**arguments)


def test_initial_states_must_match_the_contexts():
    model = make()
    with pytest.raises(ValueError, match="initial has 2 states for 3 contexts"):
        model.write(tokens(3, 5), initial=model.write(tokens(2, 5)))


def test_the_longest_allowed_context_is_written():
    state = make("gpt2", num_control_tokens=2).write(tokens(1, 96 - 7), steps=1)
    assert state.write_losses.isfinite().all()


def test_bfloat16_backbone_keeps_the_memory_in_float32():
    model = get_peft_model(tiny(scale=2.0).bfloat16(), GradMemConfig(num_memory_tokens=3))
    state = model.write(tokens(2, 8), steps=3, lr=0.1)
    assert state.vectors.dtype == torch.float32
    assert model.prefix_embeddings(state).dtype == torch.bfloat16
    assert model.generate(tokens(2, 4), memory=state, max_new_tokens=3).shape == (2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fidelity(state, tokens(2, 8))


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
@pytest.mark.parametrize("phase", ["write", "read", "both"])
def test_gradient_checkpointing_changes_nothing(phase, meta_gradient):
    """What a backward pass computes again belongs to the phase that its forward pass was in."""
    results = {}
    for checkpointing in (False, True):
        config = GradMemConfig(
            num_memory_tokens=3,
            meta_gradient=meta_gradient,
            reconstruction_weight=0.5,
            lora_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
            lora_phase=phase,
        )
        model = get_peft_model(tiny(attn_implementation="eager"), config)
        model.train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(2, 9)
        model(input_ids=ids[:, :4], labels=ids[:, :4], context_input_ids=ids).loss.backward()
        results[checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert results[True].keys() == results[False].keys()
    for name, value in results[True].items():
        torch.testing.assert_close(value, results[False][name], rtol=1e-4, atol=1e-6)


def test_exact_with_fused_attention_and_gradient_checkpointing_is_refused():
    model = make()
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 9)
    model.write(ids)
    with pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
        model(input_ids=ids[:, :4], labels=ids[:, :4], context_input_ids=ids)
