"""The whole context before every query: no compression, the upper bound that costs a cache as long as the context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradmem_adapter.model import GradMemOutput

from .packing import append


class FullContext(nn.Module):
    """A causal LM on `[context; query]`.

    Args:
        backbone: trained throughout.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        input_ids: Tensor,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        context_index: Tensor,
        labels: Tensor,
        write_steps: int | None = None,
    ) -> GradMemOutput:
        """As `GradMemModel.forward`: queries [R, T] on contexts [B, N]; there is nothing to write."""
        contexts = context_input_ids[context_index]
        lengths = context_attention_mask.sum(1)[context_index]
        tokens, places = append(contexts, lengths, input_ids)
        targets, _ = append(torch.full_like(contexts, -100), lengths, labels)
        output = self.backbone(input_ids=tokens, labels=targets, use_cache=False, return_dict=True)
        logits = output.logits.gather(1, places[..., None].expand(-1, -1, output.logits.shape[-1]))
        return GradMemOutput(loss=output.loss, target_loss=output.loss, logits=logits)
