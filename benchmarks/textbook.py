"""GradMem as a textbook would implement it: WRITE step by step, its whole graph kept, and one double backward.

Benchmarks and tests compare the package with this reference. It uses only the model's forward of Transformers, and
nothing of gradmem_adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def loss(backbone: PreTrainedModel, memory: Tensor, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean loss of tokens after a memory: L_w(M; C) for a context, or -log p(labels | [M; query]) for a query.

    Args:
        memory: [B, m, d].
        tokens: [B, N].
        labels: [B, N], -100 for tokens that do not count; None: every token counts.

    Returns:
        [B].
    """
    labels = tokens if labels is None else labels
    embeddings = backbone.get_input_embeddings()(tokens)
    inputs = torch.cat([memory.to(embeddings), embeddings], dim=1)
    logits = backbone(inputs_embeds=inputs, use_cache=False).logits
    logits = logits[:, memory.shape[1] - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return nll.sum(1) / (labels != -100).sum(1)


def write(
    backbone: PreTrainedModel,
    slots: Tensor,
    context: Tensor,
    steps: int,
    lr: float,
    second_order_steps: int | None = None,
    clip: float | None = None,
) -> Tensor:
    """The memory [B, m, d] of contexts [B, N], from slots [m, d], differentiable.

    Args:
        second_order_steps: how many of the last write steps are second order; None: all.
        clip: the maximum norm of a sample's write gradient.
    """
    memory = slots.expand(len(context), -1, -1)
    memory = memory if memory.requires_grad else memory.clone().requires_grad_()
    for k in range(steps):
        constant = second_order_steps is not None and k < steps - second_order_steps
        (gradient,) = torch.autograd.grad(loss(backbone, memory, context).sum(), memory, create_graph=not constant)
        if clip is not None:
            gradient = gradient * (clip / (gradient.norm(dim=(1, 2), keepdim=True) + 1e-6)).clamp(max=1)
        memory = memory - lr * gradient
    return memory


def outer_loss(
    backbone: PreTrainedModel, slots: Tensor, context: Tensor, query: Tensor, steps: int, lr: float
) -> Tensor:
    """The loss of queries [B, T] given the memory of contexts [B, N], with the graph of all write steps."""
    return loss(backbone, write(backbone, slots, context, steps, lr), query).mean()
