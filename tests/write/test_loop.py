"""The loop over write steps: the equation, early stops, diverging samples, no side effects."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens

from benchmarks import textbook
from gradmem_adapter import GradMemConfig


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_write_matches_the_equation(architecture):
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


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_more_steps_lower_the_loss(optimizer):
    model = make()
    state = model.write(tokens(3, 12), steps=30, lr={"sgd": 0.05, "adam": 0.02}[optimizer], optimizer=optimizer)
    assert (state.write_losses[:, -1] < 0.92 * state.write_losses[:, 0]).all()


def test_adam_matches_torch():
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


def test_the_last_loss_can_be_skipped():
    model, context, seen = make(), tokens(2, 9), []
    whole = model.write(context, steps=3)
    state = model.write(context, steps=3, last_loss=False, callback=seen.append)
    assert torch.equal(state.vectors, whole.vectors)
    assert torch.equal(state.write_losses[:, :-1], whole.write_losses[:, :-1])
    assert state.write_losses[:, -1].isnan().all()
    assert len(seen) == 3
    with pytest.raises(ValueError, match="tolerance needs the loss after the last step"):
        model.write(context, last_loss=False, tolerance=0.1)


def test_a_non_finite_last_step_is_discarded_without_a_last_loss():
    model, context = make(), tokens(2, 9)
    with pytest.warns(RuntimeWarning, match="sample 0, 1 is not finite after 1 step\\."):
        state = model.write(context, steps=1, lr=3e38, last_loss=False)
    assert torch.equal(state.vectors, model.write(context, steps=0).vectors)


def test_continuing_from_a_state_equals_more_steps():
    model = make()
    context = tokens(2, 12)
    first = model.write(context, steps=2)
    torch.testing.assert_close(
        model.write(context, steps=3, initial=first).vectors, model.write(context, steps=5).vectors
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_write_works_in_no_grad_and_inference_mode(mode):
    model = make()
    expected = model.write(tokens(2, 8))
    with mode():
        state = model.write(tokens(2, 8))
        again = model.write(tokens(2, 8), initial=state)
    assert torch.equal(state.vectors, expected.vectors)
    assert not state.vectors.requires_grad
    assert again.write_losses[0, 0] == pytest.approx(state.write_losses[0, -1].item(), rel=1e-5)


@pytest.mark.parametrize("write", ["write", "update", "write_many"])
def test_dropout_in_train_mode_gives_a_warning(write):
    """It is active after `trainer.train()`, and in the LoRA of a newly made model."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model, without, context = make(lora_config=lora), make(), tokens(1, 8)
    inputs = {"write": (context,), "write_many": (context.tolist(),)}
    inputs["update"] = (model.eval().write(context), context)
    with pytest.warns(UserWarning, match=r"lora_dropout.* has dropout.* Call model.eval\(\)"):
        getattr(model.train(), write)(*inputs[write])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(model.eval(), write)(*inputs[write])
        without.train().write(context)


def test_write_has_no_side_effects():
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


def test_tolerance_stops_each_sample_at_its_own_lowest_loss():
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


def test_write_stops_when_every_token_is_recovered():
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


def test_the_callback_is_called_at_each_step():
    seen = []
    state = make().write(tokens(2, 6), steps=3, callback=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(k, 3) for k in range(4)]
    assert torch.equal(torch.stack([p.losses for p in seen], 1), state.write_losses)


def test_a_diverging_sample_keeps_its_last_finite_memory():
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


def test_divergence_names_the_step_and_keeps_the_previous_memory():
    model = make()
    context = tokens(2, 8)
    with pytest.warns(RuntimeWarning, match=r"sample 0, 1 is not finite after 2 steps"):
        state = model.write(context, lr=1e38, steps=5)
    assert torch.equal(state.vectors, model.write(context, lr=1e38, steps=1).vectors)
    assert state.write_losses.isfinite().all()


def test_initial_states_must_match_the_contexts():
    model = make()
    with pytest.raises(ValueError, match="initial has 2 states for 3 contexts"):
        model.write(tokens(3, 5), initial=model.write(tokens(2, 5)))


def test_a_bfloat16_backbone_keeps_the_memory_in_float32():
    model = get_peft_model(tiny(scale=2.0).bfloat16(), GradMemConfig(num_memory_tokens=3))
    state = model.write(tokens(2, 8), steps=3, lr=0.1)
    assert state.vectors.dtype == torch.float32
    assert model.prefix_embeddings(state).dtype == torch.bfloat16
    assert model.generate(tokens(2, 4), memory=state, max_new_tokens=3).shape == (2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fidelity(state, tokens(2, 8))
