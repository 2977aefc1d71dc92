"""What all baselines have in common: they answer from something before the query."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.ops.padding import append
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.read.loss import forward_at_targets


class Prefix(NamedTuple):
    """What stands before the queries on C contexts."""

    embeddings: Tensor
    """[C, P, d], right padded."""
    lengths: Tensor
    """[C], how many of the P places count."""

    def rows(self, index: Tensor) -> Prefix:
        """The prefix of each query, for index [R]; for index [R, S] those of S contexts side by side."""
        if index.dim() == 1:
            return Prefix(self.embeddings[index], self.lengths[index])
        first, *others = (self.rows(column) for column in index.unbind(1))
        embeddings, lengths = first
        for other in others:
            embeddings, _ = append(embeddings, lengths, other.embeddings)
            lengths = lengths + other.lengths
        return Prefix(embeddings, lengths)


class PrefixModel(nn.Module):
    """A causal LM on `[prefix(context); query]`; a baseline says what the prefix is.

    It has the `forward` of `GradMemModel`, so that the same data, training step and evaluation serve all.

    Args:
        backbone: the causal LM; what in it is trainable is trained.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone

    def prefix(self, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The prefix for right-padded contexts [C, N] of lengths [C]."""
        raise NotImplementedError

    def auxiliary_loss(self, prefix: Prefix, context: Tensor, mask: Tensor) -> Tensor | None:
        """What is added to the loss in training."""
        return None

    def forward(
        self,
        input_ids: Tensor,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        context_index: Tensor,
        labels: Tensor,
        write_steps: int = 1,
        attention_mask: Tensor | None = None,
        max_targets: int | None = None,
    ) -> GradMemOutput:
        """Queries [R, T], right padded, on contexts [C, N], as `GradMemModel.forward` has them."""
        prefix = self.prefix(context_input_ids, context_attention_mask.sum(1), write_steps)
        embeddings, lengths = prefix.rows(context_index)
        tokens, places = append(embeddings, lengths, self.backbone.get_input_embeddings()(input_ids))
        targets, _ = append(labels.new_full(embeddings.shape[:2], IGNORED), lengths, labels)
        inputs = {"inputs_embeds": tokens, "use_cache": False, "return_dict": True}
        logits = correct = None
        if max_targets is None:
            output = self.backbone(labels=targets, **inputs)
            logits = output.logits.gather(1, places[..., None].expand(-1, -1, output.logits.shape[-1]))
        else:
            output, correct = forward_at_targets(self.backbone, targets, max_targets, **inputs)
        loss = output.loss
        if torch.is_grad_enabled():
            auxiliary = self.auxiliary_loss(prefix, context_input_ids, context_attention_mask)
            loss = loss if auxiliary is None else loss + auxiliary
        return GradMemOutput(loss=loss, target_loss=output.loss, logits=logits, correct=correct)

    @torch.no_grad()
    def generate(self, prefix: Prefix, query: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """New tokens [R, new] behind queries [R, T], left padded with their mask, as Transformers' `generate` has them.

        Args:
            prefix: one for each query.
        """
        embeddings = self.backbone.get_input_embeddings()(query)
        rows = [
            torch.cat([before[:length], row[count.bool()]])
            for before, length, row, count in zip(*prefix, embeddings, mask, strict=True)
        ]
        width = max(len(row) for row in rows)
        padded = torch.stack([nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in rows])
        counts = torch.tensor([len(row) for row in rows], device=mask.device)[:, None]
        places = torch.arange(width, device=mask.device)
        return self.backbone.generate(  # type: ignore[operator] # from a mixin
            inputs_embeds=padded, attention_mask=(places >= width - counts).to(mask.dtype), **options
        )
