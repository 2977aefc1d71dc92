"""GradMem as one would first write it down: whole logits, plain autograd through every step. The tests' reference."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def write_loss(backbone, memory, ids):
    """L_w of one context ids [N], memory [m, d], by the equation."""
    m = len(memory)
    embeddings = torch.cat([memory, backbone.get_input_embeddings()(ids).to(memory)])[None]
    logits = backbone(inputs_embeds=embeddings, use_cache=False).logits[0]
    return F.cross_entropy(logits[m - 1 : -1], ids)


def write(backbone, memory, ids, steps, lr, second_order_steps=None, clip=None):
    """M_K of one context, differentiable; steps before the last `second_order_steps` count as constants."""
    for k in range(steps):
        exact = second_order_steps is None or k >= steps - second_order_steps
        point = memory if memory.requires_grad else memory.requires_grad_()
        (gradient,) = torch.autograd.grad(write_loss(backbone, point, ids), point, create_graph=exact)
        gradient = gradient if exact else gradient.detach()
        if clip is not None:
            gradient = gradient * (clip / (gradient.norm() + 1e-6)).clamp(max=1)
        memory = memory - lr * gradient
    return memory


def read_loss(backbone, memory, query, labels):
    """-log p(labels | [M; query]) of one query, mean over the labels that count."""
    m = len(memory)
    embeddings = torch.cat([memory, backbone.get_input_embeddings()(query)])[None]
    logits = backbone(inputs_embeds=embeddings, use_cache=False).logits[0]
    return F.cross_entropy(logits[m - 1 : -1], labels, ignore_index=-100)
