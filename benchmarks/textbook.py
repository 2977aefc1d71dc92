"""Meta-training as a textbook has it: WRITE written out, one double backward through all its steps.

For comparison alone. It uses the model's own forward and loss of Transformers and nothing of gradmem_adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def outer_loss(
    backbone: PreTrainedModel, slots: Tensor, context: Tensor, query: Tensor, steps: int, lr: float
) -> Tensor:
    """The loss of `query` given the memory of `context`, with the graph of all write steps.

    Args:
        slots: [m, d]; context: [B, N]; query: [B, T], every token of which is a target.
    """
    embedding = backbone.get_input_embeddings()
    memory = slots.expand(len(context), -1, -1)

    def loss(memory: Tensor, tokens: Tensor) -> Tensor:
        embeddings = embedding(tokens)
        inputs = torch.cat([memory.to(embeddings), embeddings], dim=1)
        logits = backbone(inputs_embeds=inputs, use_cache=False).logits
        logits = logits[:, memory.shape[1] - 1 : -1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        return nll.mean(1)

    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(memory, context).sum(), memory, create_graph=True)
        memory = memory - lr * gradient
    return loss(memory, query).mean()
