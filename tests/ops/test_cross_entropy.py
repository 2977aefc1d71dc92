"""Chunked cross entropy, fused with its gradient or not, matches PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from gradmem_adapter.ops import cross_entropy
from gradmem_adapter.ops.cross_entropy import FUSED, sequence_nll

VOCABULARY = 11


@pytest.mark.parametrize("positions", [1, 3, 100])
@pytest.mark.parametrize("fused", [None, FUSED])
def test_chunks_and_fusion_change_nothing(fused, positions, monkeypatch):
    head = torch.nn.Linear(4, VOCABULARY).double().requires_grad_(fused is None)
    hidden = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(VOCABULARY, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])
    for name in ("MAX_LOGITS", "MAX_LOGITS_IN_CACHE"):
        monkeypatch.setattr(cross_entropy, name, 2 * positions * VOCABULARY)
    total, correct = sequence_nll(hidden, targets, mask, head, VOCABULARY, fused)
    each = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(2, 7) * mask
    torch.testing.assert_close(total, each.sum(1))
    assert torch.equal(correct, ((head(hidden).argmax(-1) == targets) & mask).sum(1))
    weights = torch.tensor([2.0, 3.0], dtype=torch.float64)  # samples do not interact
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = torch.autograd.grad((weights * each.sum(1)).sum(), leaves)
    for found, gradient in zip(torch.autograd.grad((weights * total).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_correct_tokens_are_counted_only_on_request():
    hidden, targets = torch.randn(1, 3, VOCABULARY), torch.randint(VOCABULARY, (1, 3))
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert sequence_nll(hidden, targets, mask, lambda x: x, VOCABULARY, count_correct=False)[1] is None
