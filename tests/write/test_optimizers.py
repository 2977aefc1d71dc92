"""Write optimizers: each against plain autograd through all steps, and a custom one, added with a file and a line."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tokens
from toy_optimizer import Toy

from benchmarks import textbook
from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.parameters import backbone_parameters
from gradmem_adapter.write.optimizers import OPTIMIZERS
from gradmem_adapter.write.step import clip


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "toy", Toy())


def written(backbone, slots, context, optimizer, steps, lr, clip_norm):
    """M_K from the update rule and plain autograd, differentiable."""
    state = OPTIMIZERS[optimizer].start(slots.expand(len(context), -1, -1))
    for _ in range(steps):
        loss = textbook.loss(backbone, state.memory, context).sum()
        (gradient,) = torch.autograd.grad(loss, state.memory, create_graph=True)
        state = OPTIMIZERS[optimizer].update(state, clip(gradient, clip_norm), lr)
    return state.memory


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "toy"])
@pytest.mark.parametrize(("meta_gradient", "tolerance"), [("exact", 1e-6), ("finite_difference", 1e-3)])
def test_training_through_a_write_optimizer_equals_autograd(meta_gradient, tolerance, optimizer, clip_norm):
    backbone = tiny("gpt2", scale=2.0, attn_implementation="eager").double()
    reference = copy.deepcopy(backbone)
    config = GradMemConfig(
        num_memory_tokens=3, write_steps=3, write_lr=0.05, write_optimizer=optimizer, write_clip_norm=clip_norm,
        meta_gradient=meta_gradient, train_backbone=True,
    )  # fmt: skip
    model = get_peft_model(backbone, config)
    slots = model.base_model.slots.gradmem_memory["default"]
    context, query = tokens(2, 9, seed=2), tokens(2, 5, seed=1)

    model(input_ids=query, labels=query, context_input_ids=context).loss.backward()
    initial = slots.detach().clone().requires_grad_()
    memory = written(reference, initial, context, optimizer, 3, 0.05, clip_norm)
    textbook.loss(reference, memory, query).mean().backward()

    assert relative(slots.grad, initial.grad) < tolerance
    ours = dict(backbone_parameters(model.get_base_model()))
    for name, parameter in reference.named_parameters():
        if parameter.grad.norm() > 1e-9:
            assert relative(ours[name].grad, parameter.grad) < tolerance, name


def test_a_custom_optimizer_writes_and_trains():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, write_optimizer="toy", write_lr=0.1))
    ids = tokens(2, 9)
    losses = model.write(ids, steps=6).write_losses
    assert (losses[:, -1] < losses[:, 0]).all()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outer = []
    for _ in range(8):
        optimizer.zero_grad()
        output = model(input_ids=ids[:, :4], labels=ids[:, :4], context_input_ids=ids)
        output.loss.backward()
        optimizer.step()
        outer.append(output.loss.item())
    assert outer[-1] < outer[0]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="write_optimizer must be one of 'sgd', 'adam', 'toy', got 'lion'"):
        GradMemConfig(write_optimizer="lion")


def test_clipping_scales_each_sample_separately():
    gradient = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    torch.testing.assert_close(clip(gradient, 1.0), torch.tensor([[[0.6, 0.8]], [[0.3, 0.4]]]))
    assert clip(gradient, None) is gradient
