"""Memory by averaging: the context's last hidden states, pooled."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.ops.padding import part_means

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
        return Prefix(*part_means(hidden, lengths, self.num_memory_tokens))
