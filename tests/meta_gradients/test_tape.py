"""A write step on the tape is recomputed exactly as it was, and training takes the memory of one step."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from outer import difference_along_gradient, gradients, loss64, train_step
from peft import get_peft_model
from tiny import tiny, tokens
from torch.nn import functional as F

from gradmem_adapter import GradMemConfig
from gradmem_adapter.training.compiled import SHORTCUTS, compiled_layers


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
def test_dropout_masks_are_the_same_in_forward_and_backward(meta_gradient):
    """With dropout on, the gradient is still that of the computed loss."""
    model = get_peft_model(
        tiny("gpt2", embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3).double(),
        GradMemConfig(num_memory_tokens=2, write_lr=0.3, meta_gradient=meta_gradient),
    )
    model.train()
    slots = model.base_model.slots.gradmem_memory["default"]

    loss64(model, seed=3).backward()
    expected = pytest.approx(slots.grad.norm().item(), rel=1e-4)
    assert difference_along_gradient(model, slots, seed=3) == expected
    assert difference_along_gradient(model, slots, seed=4) != expected  # other masks, another loss


def test_autocast_is_the_same_in_forward_and_backward():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2, write_lr=0.3, train_backbone=True))
    train_step(model)
    full = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            input_ids=tokens(2, 5, seed=1), labels=tokens(2, 5, seed=1), context_input_ids=tokens(2, 9, seed=2)
        )
    model.zero_grad()
    output.loss.backward()
    half = gradients(model)
    flat = [torch.cat([g[name].flatten() for name in full]) for g in (full, half)]
    assert F.cosine_similarity(*flat, dim=0) > 0.9
    assert not torch.equal(*flat)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
def test_weights_are_constants_during_a_write_step(meta_gradient, checkpointing):
    """Otherwise a compiled layer would compute gradients nobody needs. Those it computes later are the same."""
    config = GradMemConfig(num_memory_tokens=2, write_steps=2, train_backbone=True, meta_gradient=meta_gradient)
    model = get_peft_model(tiny().double(), config).train()
    backbone = model.get_base_model()
    if checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = []

    def look(*_):
        seen.append(sum(p.requires_grad for p in trained) / len(trained))

    handle = backbone.model.register_forward_pre_hook(look)
    train_step(model)
    assert seen[:3] == [0, 0, 1]  # two steps and READ
    assert set(seen[3:]) <= {1}  # the outer gradient crosses the steps
    handle.remove()
    eager = gradients(model)
    model.zero_grad()
    with compiled_layers(model, static=True, backend="aot_eager") if meta_gradient != "exact" else nullcontext():
        train_step(model)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_shortcuts_that_lose_gradients_are_off_where_layers_are_compiled(name):
    """They are on by default in torch 2.11, where the test above fails with them."""
    with torch._dynamo.config.patch({name: True}):
        with compiled_layers(get_peft_model(tiny(), GradMemConfig()), static=True):
            assert not getattr(torch._dynamo.config, name)
        assert getattr(torch._dynamo.config, name)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_evaluation_skips_the_pass_for_the_last_write_loss(steps):
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, write_lr=0.3))
    passes = []
    model.get_base_model().model.register_forward_hook(lambda *of: passes.append(of))
    with torch.no_grad():
        output = model(input_ids=tokens(2, 5), context_input_ids=tokens(2, 9), write_steps=steps)
    assert output.write_losses.shape == (2, steps)
    assert output.write_losses.isfinite().all()
    assert len(passes) == steps + 1  # and READ


def test_requires_grad_is_restored_after_an_error():
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2, train_backbone=True))
    before = [p.requires_grad for p in model.parameters()]
    handle = model.get_base_model().model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_step(model)
    handle.remove()
    assert [p.requires_grad for p in model.parameters()] == before


_PEAK = r"""
import re, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from peft import get_peft_model
from tiny import tiny, tokens
from gradmem_adapter import GradMemConfig
torch.set_num_threads(1)


def peak():
    # Of this program alone; getrusage would start at the peak of the process that started it.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


model = get_peft_model(
    tiny(num_hidden_layers=6, hidden_size=128, intermediate_size=256, max_position_embeddings=512, scale=1.0),
    GradMemConfig(
        num_memory_tokens=8, write_steps=int(sys.argv[1]), write_lr=0.1, train_backbone=True, meta_gradient=sys.argv[2]
    ),
)
base = peak()
ids = tokens(4, 400)
model(input_ids=ids[:, :8], labels=ids[:, :8], context_input_ids=ids).loss.backward()
print(peak() - base)
"""


def peak_kib(steps, meta_gradient):
    command, root = [sys.executable, "-c", _PEAK, str(steps), meta_gradient], Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
def test_memory_of_a_training_step_does_not_grow_with_the_write_steps(meta_gradient):
    """What the process takes beyond the loaded model: stricter than the whole process's peak."""
    one, six = peak_kib(1, meta_gradient), peak_kib(6, meta_gradient)
    assert one > 50_000  # KiB; there is something to compare
    assert six < 1.25 * one, (one, six)
