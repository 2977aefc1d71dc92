"""A new strategy is one file and one entry in `STRATEGIES`."""

import pytest
import torch
from peft import get_peft_model
from straight_through import StraightThrough
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.meta_gradients import STRATEGIES


def test_a_new_strategy_trains(monkeypatch):
    with pytest.raises(ValueError, match=r"meta_gradient must be one of .*'first_order', .* got 'straight_through'"):
        GradMemConfig(meta_gradient="straight_through")

    monkeypatch.setitem(STRATEGIES, "straight_through", StraightThrough())  # the line

    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, meta_gradient="straight_through")
    assert GradMemConfig(**config.to_dict()).meta_gradient == "straight_through"
    model = get_peft_model(tiny(scale=2.0), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    context, losses = tokens(4, 6), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=context, labels=context, context_input_ids=context).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
