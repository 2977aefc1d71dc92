"""Memory by averaging: the context's last hidden states, pooled."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .prefix_model import Prefix, PrefixModel


class MeanPooling(PrefixModel):
    """Vector j is the mean of the last hidden states over the j-th of m equal parts of the context.

    Args:
        num_memory_tokens: m; a context of fewer tokens has as many vectors as tokens.
    """

    def __init__(self, backbone: PreTrainedModel, num_memory_tokens: int) -> None:
        super().__init__(backbone)
        self.num_memory_tokens = num_memory_tokens

    def prefix(self, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """One pass over the context, whatever `steps`."""
        hidden = self.backbone.base_model(context, use_cache=False).last_hidden_state
        places = torch.arange(context.shape[1], device=context.device)
        parts = lengths.clamp(max=self.num_memory_tokens)
        part = places * parts[:, None] // lengths[:, None]
        vectors = torch.arange(self.num_memory_tokens, device=context.device)
        share = (part[:, None] == vectors[:, None]) & (places < lengths[:, None])[:, None]
        mean = share.to(hidden.dtype) / share.sum(-1, keepdim=True).clamp(min=1).to(hidden.dtype)
        return Prefix(mean @ hidden, parts)
