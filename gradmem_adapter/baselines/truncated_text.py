"""As many tokens of the context as the memory has vectors; with none, what the questions alone give away."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from .prefix_model import Prefix, PrefixModel


class TruncatedText(PrefixModel):
    """A causal LM on `[first tokens of the context; query]`.

    Args:
        num_memory_tokens: m, the tokens that are kept; 0: no context.
    """

    def __init__(self, backbone: PreTrainedModel, num_memory_tokens: int) -> None:
        super().__init__(backbone)
        self.num_memory_tokens = num_memory_tokens

    def prefix(self, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The embeddings of the first m tokens."""
        kept = context[:, : self.num_memory_tokens]
        return Prefix(self.backbone.get_input_embeddings()(kept), lengths.clamp(max=kept.shape[1]))
