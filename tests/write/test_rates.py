"""Learned write learning rates."""

import math

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.write.rates import keep_write_lrs


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


def test_steps_beyond_the_learned_rates_use_the_last_one():
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
def test_rate_factors_are_counted_from_the_last_step(kind):
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
    # Continuing from a memory means continuing after the last step.
    torch.testing.assert_close(
        model.write(context, steps=2, initial=model.write(context, steps=2)).vectors,
        model.write(context, steps=4).vectors,
    )


def test_each_element_can_have_its_own_rate():
    model, context = make(learn_write_lr="per_element"), tokens(2, 9)
    before = model.write(context, steps=0).vectors
    whole = model.write(context, steps=1).vectors
    with torch.no_grad():
        model.base_model.slots.gradmem_log_write_lr["default"][0, 1, 2] += math.log(2)
    expected = whole.clone()
    expected[:, 1, 2] += (whole - before)[:, 1, 2]
    torch.testing.assert_close(model.write(context, steps=1).vectors, expected)


def test_keeping_fewer_rates_leaves_their_steps_unchanged():
    model, context = make(learn_write_lr="per_element", num_write_lrs=3, write_lr_from_end=True), tokens(2, 9)
    slots = model.base_model.slots
    with torch.no_grad():
        slots.gradmem_log_write_lr["default"].normal_(std=0.3)
        slots.gradmem_log_write_lr_end["default"].normal_(std=0.3)
    before = [model.write(context, steps=k) for k in range(4)]
    keep_write_lrs(model, 2)
    assert model.active_peft_config.num_write_lrs == 2
    for k in range(3):
        assert model.write(context, steps=k).vectors.equal(before[k].vectors)
    further = model.write(context, steps=1, initial=model.write(context, steps=2))
    assert model.write(context, steps=3).vectors.equal(further.vectors)
    assert slots.gradmem_log_write_lr["default"].requires_grad


def test_missing_rates_cannot_be_kept():
    model = make(learn_write_lr="scalar", num_write_lrs=3)
    for n in (0, 4):
        with pytest.raises(ValueError, match=r"between 1 and num_write_lrs \(3\)"):
            keep_write_lrs(model, n)
    with pytest.raises(ValueError, match="learn_write_lr='no'"):
        keep_write_lrs(make(), 1)
