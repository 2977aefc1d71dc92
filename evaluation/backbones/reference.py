"""GradMem implemented from its definition, without the package's code: plain autograd through a backbone's
`inputs_embeds`, one unpadded row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Reference:
    """WRITE, READ and the outer loss.

    Args:
        backbone (`PreTrainedModel`): a causal LM, possibly with a LoRA.
        lr (`float`): the write learning rate.
        steps (`int`): K.
    """

    def __init__(self, backbone: Any, lr: float, steps: int) -> None:
        self.backbone, self.lr, self.steps = backbone, lr, steps

    def logits(self, memory: Tensor, ids: Tensor) -> Tensor:
        """Logits `[T + 1, V]` at the last memory vector and at each token after the memory `[m, d]`."""
        embeddings = self.backbone.get_input_embeddings()(ids[None])
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            inputs = torch.cat([memory[None].to(embeddings), embeddings], dim=1)
            return self.backbone(inputs_embeds=inputs, use_cache=False).logits[0, len(memory) - 1 :]

    def loss(self, memory: Tensor, ids: Tensor) -> Tensor:
        """The mean cross entropy of tokens `[T]` after a memory."""
        return F.cross_entropy(self.logits(memory, ids)[:-1].float(), ids)

    def write(self, start: Tensor, context: Tensor, meta_gradient: str = "none") -> Tensor:
        """The memory `[m, d]` after K steps, as a function of the start and of the weights."""
        memory = start if start.requires_grad else start.detach().requires_grad_()
        exact = meta_gradient == "exact"
        for _ in range(self.steps):
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self.loss(memory, context), memory, create_graph=exact)
            memory = memory - self.lr * gradient
        return memory if meta_gradient != "none" else memory.detach()

    def outer_gradients(
        self,
        start: Tensor,
        contexts: list[Tensor],
        queries: list[Tensor],
        weights: Sequence[Tensor],
        meta_gradient: str,
    ) -> Tensor:
        """Gradients of the outer loss (the mean over the queries' tokens) for M_0 and the weights, as one vector."""
        inputs = [start.detach().requires_grad_(), *weights]
        sums = [
            self.loss(self.write(inputs[0], context, meta_gradient), query) * len(query)
            for context, query in zip(contexts, queries, strict=True)
        ]
        outer = torch.stack(sums).sum() / sum(map(len, queries))
        return flat(inputs, torch.autograd.grad(outer, inputs, allow_unused=True))

    @torch.no_grad()
    def decode(self, memory: Tensor, prompt: Tensor, count: int) -> Tensor:
        """The greedy tokens `[count]`, each from a full forward pass."""
        ids = prompt
        for _ in range(count):
            ids = torch.cat([ids, self.logits(memory, ids)[-1:].argmax(-1)])
        return ids[len(prompt) :]


def flat(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients as one vector, with zeros for missing ones."""
    pairs = zip(inputs, gradients, strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten().double() for x, g in pairs])
