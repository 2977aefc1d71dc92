"""The outer loss: of the targets only, with whether they are predicted correctly, and through WRITE."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reading import ROWS, greedy_without_cache, make, pad_left, pad_right
from tiny import ARCHITECTURES, VOCABULARY, tiny, tokens

from gradmem_adapter import GradMemConfig


@pytest.mark.parametrize("trained", ["lora", "backbone"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "bert"])
def test_computing_only_the_targets_gives_the_same_loss(architecture, trained):
    """With padding on both sides; the head is trained with the backbone, and with a LoRA if it covers the head."""
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


def test_more_targets_than_max_targets_are_refused():
    model = make()
    state, query = model.write(tokens(1, 9)), tokens(2, 4)
    with pytest.raises(ValueError, match="A query has 4 labels that count, but max_targets is 3"):
        model(input_ids=query, labels=query, memory=state, max_targets=3)
    with pytest.raises(ValueError, match="needs labels"):
        model(input_ids=query, memory=state, max_targets=3)


def test_the_loss_is_divided_by_num_items_in_batch():
    """As Transformers' Trainer expects over the micro-batches of a step."""
    model = make()
    state, query = model.write(tokens(1, 9)), tokens(2, 4)
    whole, few = (
        model(input_ids=query, labels=query, memory=state, num_items_in_batch=30, **few).loss
        for few in ({}, {"max_targets": 4})
    )
    torch.testing.assert_close(few, whole)


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
