"""GradMem as a textbook has it: WRITE written out, its graph kept, one double backward through all its steps.

For comparison alone. It uses the model's own forward and loss of Transformers and nothing of gradmem_adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def loss(backbone: PreTrainedModel, memory: Tensor, tokens: Tensor) -> Tensor:
    """The loss [B] of tokens [B, N] behind a memory [B, m, d]."""
    embeddings = backbone.get_input_embeddings()(tokens)
    inputs = torch.cat([memory.to(embeddings), embeddings], dim=1)
    logits = backbone(inputs_embeds=inputs, use_cache=False).logits
    logits = logits[:, memory.shape[1] - 1 : -1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    return nll.mean(1)


def write(
    backbone: PreTrainedModel, slots: Tensor, context: Tensor, steps: int, lr: float, keep_graph: bool = True
) -> Tensor:
    """The memory [B, m, d] of contexts [B, N], from slots [m, d]."""
    memory = slots.expand(len(context), -1, -1).clone()
    if not memory.requires_grad:
        memory.requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(backbone, memory, context).sum(), memory, create_graph=keep_graph)
        memory = memory - lr * gradient
        if not keep_graph:
            memory = memory.detach().requires_grad_()
    return memory


def outer_loss(
    backbone: PreTrainedModel, slots: Tensor, context: Tensor, query: Tensor, steps: int, lr: float
) -> Tensor:
    """The loss of `query` given the memory of `context`, with the graph of all write steps.

    Args:
        slots: [m, d]; context: [B, N]; query: [B, T], every token of which is a target.
    """
    return loss(backbone, write(backbone, slots, context, steps, lr), query).mean()
