"""The target loss of READ, with logits at the targets alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gradmem_adapter.ops.cross_entropy import IGNORED, PLAIN, target_losses
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.utils.capture import capturing


def targets_only(
    backbone: PreTrainedModel, labels: Tensor | None, most: int, **inputs: Any
) -> tuple[CausalLMOutputWithPast, Tensor]:
    """The backbone's output with the loss of at most `most` labels a row of [B, T], and whether all are first choices.

    Raises:
        ValueError: there are no labels, or more.
    """
    if labels is None:
        raise ValueError("max_targets needs labels.")
    if not capturing() and (found := int((labels != IGNORED).sum(1).max())) > most:
        raise ValueError(f"max_targets is {most}, and a query has {found} labels that count.")
    output = backbone.base_model(**inputs)
    head = backbone.get_output_embeddings()
    once = None if any(parameter.requires_grad for parameter in head.parameters()) else PLAIN
    loss, correct = target_losses(
        output.last_hidden_state, labels, most, output_head(backbone), head.weight.shape[0], once
    )
    return CausalLMOutputWithPast(loss=loss, past_key_values=output.get("past_key_values")), correct
