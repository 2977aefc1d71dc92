"""The write loss: full logits are never held, and correct tokens are counted only on request."""

import torch
from peft import get_peft_model
from tiny import VOCABULARY, tiny, tokens

import gradmem_adapter.ops.cross_entropy
from gradmem_adapter import GradMemConfig


def make(architecture="llama", **config):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3}
    return get_peft_model(tiny(architecture), GradMemConfig(**defaults | config))


def test_full_logits_are_never_held(monkeypatch):
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


def test_correct_tokens_are_counted_only_on_request(monkeypatch):
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
