"""Learned write learning rates."""

import math

import torch
from peft import get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig


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


def test_each_element_can_have_its_own_rate():
    model, context = make(learn_write_lr="per_element"), tokens(2, 9)
    before = model.write(context, steps=0).vectors
    whole = model.write(context, steps=1).vectors
    with torch.no_grad():
        model.base_model.slots.gradmem_log_write_lr["default"][0, 1, 2] += math.log(2)
    expected = whole.clone()
    expected[:, 1, 2] += (whole - before)[:, 1, 2]
    torch.testing.assert_close(model.write(context, steps=1).vectors, expected)
