"""The outer loss: the loss of the targets read from memory, plus the weighted write loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from gradmem_adapter.ops.cross_entropy import FUSED, IGNORED, sequence_nll, shifted_nll
from gradmem_adapter.ops.output_head import output_head, trains_head
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.utils.backbone import fresh, trunk
from gradmem_adapter.utils.capture import capturing


def outer_loss(target_loss: Tensor, write_losses: Tensor | None, reconstruction_weight: float) -> Tensor:
    """The loss that meta-training minimises, the mean over all target tokens y_t and that of the last write loss over
    the C contexts:

        L_out = -mean log p(y_t | [M_K; query; y_<t]) + reconstruction_weight * mean L_w(M_{K-1}; C)

    Args:
        target_loss (`Tensor`): a scalar, the first term.
        write_losses (`Tensor`, *optional*): `[C, K]`, the write losses before each step. `None`: nothing was written.
        reconstruction_weight (`float`): the configured weight.
    """
    if write_losses is None or not write_losses.shape[1] or not reconstruction_weight:
        return target_loss
    return target_loss + reconstruction_weight * write_losses[:, -1].mean()


def loss_of_logits(
    backbone: PreTrainedModel, output: ModelOutput, labels: Tensor, count: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """The mean cross entropy of tokens with a label, each predicted from the position before it, and its sum for each
    row `[B]`.

    Computed here because some backbones shift labels and some do not. The auxiliary loss of a router
    (`config.router_aux_loss_coef`) is added to the mean as the backbone would add it.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        output (`ModelOutput`): its output, with logits `[B, T, V]`.
        labels (`Tensor`): `[B, T]`, `IGNORED` for tokens without a loss.
        count (`Tensor` or `int`, *optional*): the number of tokens to divide the sum by. `None`: the tokens with a
            label.
    """
    labels = labels.to(output["logits"].device)
    nll = shifted_nll(output["logits"], labels)
    loss = nll.sum() / ((labels[:, 1:] != IGNORED).sum() if count is None else count)
    routing = output.get("aux_loss")
    if isinstance(routing, Tensor):
        loss = loss + getattr(backbone.config.get_text_config(), "router_aux_loss_coef", 0.0) * routing.to(loss.device)
    return loss, nll


def forward_at_targets(
    backbone: PreTrainedModel,
    labels: Tensor | None,
    max_targets: int,
    count: Tensor | int | None = None,
    **inputs: Any,
) -> GradMemOutput:
    """The backbone's forward pass, with the output head applied only where a label counts.

    Most positions of a query and its target have no label, so most of the head's work is saved.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        labels (`Tensor`, *optional*): `[B, T]`, -100 for tokens without a loss.
        max_targets (`int`): the most labels that count in a row.
        count (`Tensor` or `int`, *optional*): the number of tokens to divide the sum by. `None`: the tokens with a
            label.
        inputs: arguments of the inner model, including `inputs_embeds` `[B, T, d]`.

    Returns:
        `GradMemOutput` with `loss`, `target_nll`, `correct` and `target_states`, and without logits.

    Raises:
        ValueError: there are no labels, a row has more than `max_targets`, or a router's loss is requested.
    """
    if labels is None:
        raise ValueError("max_targets needs labels. Pass labels, or leave max_targets out.")
    config = backbone.config.get_text_config()
    if inputs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise ValueError(
            "max_targets cannot be combined with output_router_logits, because the router's loss is then not computed. "
            "Leave max_targets out (batches from RowBatches have it), or set output_router_logits=False in the "
            "backbone's configuration."
        )
    if not capturing() and (found := int((labels != IGNORED).sum(1).max())) > max_targets:
        raise ValueError(f"A query has {found} labels that count, but max_targets is {max_targets}. Raise max_targets.")
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
        target_nll=nll,
        target_states=states,
    )
    assert correct is not None  # for the type checker
    made.correct = correct == mask.sum(1)
    return made


def before_targets(hidden: Tensor, labels: Tensor, max_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states that predict tokens with a label.

    Args:
        hidden (`Tensor`): `[B, T, h]`, the last hidden states; the one before a token predicts it.
        labels (`Tensor`): `[B, T]`, `IGNORED` for tokens without a loss.
        max_targets (`int`): n, the most labels that count in a row.

    Returns:
        States `[B, n, h]`, the tokens `[B, n]` that they predict, and booleans `[B, n]`: which of these tokens count.
    """
    counts = labels != IGNORED
    places = counts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :max_targets]
    before = (places - 1).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, before), labels.gather(1, places).clamp(min=0), counts.gather(1, places)
