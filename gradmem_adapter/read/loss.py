"""The outer loss: that of the targets, read from memory, and what the write loss adds to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from gradmem_adapter.ops.cross_entropy import FUSED, IGNORED, sequence_nll, shifted_cross_entropy
from gradmem_adapter.ops.output_head import output_head, trains_head
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.utils.backbone import fresh, trunk
from gradmem_adapter.utils.capture import capturing


def outer_loss(target_loss: Tensor, write_losses: Tensor | None, reconstruction_weight: float) -> Tensor:
    """What meta-training minimises, with the mean over the C contexts of the last write loss:

        L_out = -log p(target | [M_K; query]) + reconstruction_weight * mean L_w(M_{K-1}; C)

    Args:
        target_loss (`Tensor`): a scalar, the first term.
        write_losses (`Tensor`, *optional*): `[C, K]`, the write losses before each step. `None`: nothing was written.
        reconstruction_weight (`float`): the configuration's.
    """
    if write_losses is None or not write_losses.shape[1] or not reconstruction_weight:
        return target_loss
    return target_loss + reconstruction_weight * write_losses[:, -1].mean()


def loss_of_logits(
    backbone: PreTrainedModel, output: ModelOutput, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """The mean cross entropy of tokens with a label, each predicted from the place before it.

    Computed here, because backbones disagree: some shift labels and some do not. What a router adds to the loss
    (`config.router_aux_loss_coef`) is added as the backbone would.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        output (`ModelOutput`): what it returned, with logits `[B, T, V]`.
        labels (`Tensor`): `[B, T]`, `IGNORED` where no loss counts.
        count (`Tensor` or `int`, *optional*): how many tokens the sum is divided by. `None`: those with a label.
    """
    loss = shifted_cross_entropy(output["logits"], labels, count)
    routing = output.get("aux_loss")
    if isinstance(routing, Tensor):
        loss = loss + getattr(backbone.config.get_text_config(), "router_aux_loss_coef", 0.0) * routing.to(loss.device)
    return loss


def forward_at_targets(
    backbone: PreTrainedModel,
    labels: Tensor | None,
    max_targets: int,
    count: Tensor | int | None = None,
    **inputs: Any,
) -> GradMemOutput:
    """The backbone's forward with the output head applied where a label counts and nowhere else.

    Of a query and its target most positions have no label: the head sees only those that have one.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        labels (`Tensor`, *optional*): `[B, T]`, -100 where no loss counts.
        max_targets (`int`): of a row at most so many labels count.
        count (`Tensor` or `int`, *optional*): how many tokens the sum is divided by. `None`: those with a label.
        inputs: what the inner model takes, `inputs_embeds` `[B, T, d]` among it.

    Returns:
        `GradMemOutput` with `loss`, `correct` and `target_states`, and without logits.

    Raises:
        ValueError: there are no labels, or more than `max_targets` in a row, or a router's loss is asked for.
    """
    if labels is None:
        raise ValueError("max_targets needs labels.")
    config = backbone.config.get_text_config()
    if inputs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise ValueError(
            "With max_targets the loss of the router is not computed, and output_router_logits asks for it: leave "
            "max_targets out (what RowBatches makes has it), or set output_router_logits to False in the backbone's "
            "configuration."
        )
    if not capturing() and (found := int((labels != IGNORED).sum(1).max())) > max_targets:
        raise ValueError(f"max_targets is {max_targets}, and a query has {found} labels that count.")
    output = trunk(fresh(backbone))(**inputs)
    states, targets, mask = before_targets(output.last_hidden_state, labels, max_targets)
    vocabulary = backbone.get_output_embeddings().weight.shape[0]
    fused = None if trains_head(backbone) else FUSED
    nll, correct = sequence_nll(states, targets, mask, output_head(backbone), vocabulary, fused)
    loss = nll.sum() / (mask.sum() if count is None else count)
    made = GradMemOutput(
        loss=loss,
        past_key_values=output.get("past_key_values"),
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        target_states=states,
    )
    assert correct is not None  # for the type checker
    made.correct = correct == mask.sum(1)
    return made


def before_targets(hidden: Tensor, labels: Tensor, max_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states that predict tokens with a label.

    Args:
        hidden (`Tensor`): `[B, T, h]`, the last hidden states; the one before a token predicts it.
        labels (`Tensor`): `[B, T]`, `IGNORED` where no loss counts.
        max_targets (`int`): n; of a row, at most so many labels count.

    Returns:
        States `[B, n, h]`, the tokens `[B, n]` that they predict, and booleans `[B, n]`: which of these count.
    """
    counts = labels != IGNORED
    places = counts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :max_targets]
    before = (places - 1).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, before), labels.gather(1, places).clamp(min=0), counts.gather(1, places)
