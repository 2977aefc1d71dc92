"""READ as a forward pass: loss and logits of queries after their memory."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, SupportsIndex, get_args, is_typeddict

from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import TransformersKwargs

from gradmem_adapter.config import unknown_fields
from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.read.left_padding import check_left_padding
from gradmem_adapter.read.loss import forward_at_targets, loss_of_logits
from gradmem_adapter.read.prefix import read_inputs
from gradmem_adapter.utils.backbone import check_length, first_position, fresh, trunk
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.tokens import check_token_options, check_tokens

_OF_MEMORY = (
    "memory", "context_input_ids", "context_attention_mask", "context_index", "write_steps", "max_targets", "strict",
)  # fmt: skip
_OF_TRANSFORMERS = ("return_dict", "use_cache", "token_type_ids")
"""Arguments that any backbone gets: from PEFT, from here, and from tokenizers."""


def query_embeddings(
    backbone: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """The embeddings `[B, T, d]` of queries, given as token ids `[B, T]` or as embeddings.

    Raises:
        TypeError, ValueError: neither or both are given, an id is not in the model's vocabulary, or the mask has
            another shape.
    """
    if inputs_embeds is not None and input_ids is None:
        check_kind("inputs_embeds", inputs_embeds, Tensor, "a tensor [batch, length, width]")
        if inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds must have shape [batch, length, width], got {tuple(inputs_embeds.shape)}.")
        if attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"inputs_embeds {tuple(inputs_embeds.shape)} need an attention mask {tuple(inputs_embeds.shape[:2])}, "
                f"got {tuple(attention_mask.shape)}."
            )
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("Pass the query as either input_ids or inputs_embeds, not both or neither.")
    check_tokens("input_ids", input_ids, attention_mask, backbone)
    return backbone.get_input_embeddings()(input_ids)


def check_known(options: Collection[str], backbone: PreTrainedModel) -> None:
    """Raise `TypeError` for arguments that forward would ignore, for example a misspelt `memory`.

    Nearly all backbones take any keyword argument. Those of Transformers use the ones in `TransformersKwargs`. For a
    backbone that does not say which it uses, only names close to one of ours are refused.

    Args:
        options (`Collection[str]`): names of arguments other than those of `GradMemModel.forward`.
        backbone (`PreTrainedModel`): the causal LM.
    """
    if not options:
        return  # a fast path: every step of training and decoding comes here
    known, takes_any = {*_OF_MEMORY, *_OF_TRANSFORMERS}, False
    for function in (backbone.forward, trunk(backbone).forward, ForCausalLMLoss):
        parameters = inspect.signature(function).parameters
        known |= parameters.keys()
        for rest in (parameter for parameter in parameters.values() if parameter.kind is parameter.VAR_KEYWORD):
            said = [kind for kind in get_args(rest.annotation) if is_typeddict(kind)]  # **kwargs: Unpack[kind]
            if not said and function.__module__.startswith("transformers."):
                said = [TransformersKwargs]
            known.update(*(kind.__annotations__ for kind in said))
            takes_any |= not said
    if takes_any:
        options = [name for name in options if get_close_matches(name, _OF_MEMORY, cutoff=0.8)]
    if unknown := unknown_fields(options, known):
        raise TypeError(
            f"forward() has no argument {unknown} {type(backbone).__name__} would ignore it silently. Correct the name "
            "or leave it out."
        )


def check_forward_options(options: dict[str, Any], query: Tensor) -> None:
    """Raise `ValueError` for arguments of the backbone's forward that cannot be combined with memory.

    Args:
        options (`dict`): the arguments; token types of 0 are removed.
        query (`Tensor`): `[B, T, d]`.
    """
    if options.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values cannot be combined with memory in forward(), because positions are computed from the "
            "prefix and the mask. Use generate(), which takes caches, or pass prefix_embeddings(state) to the backbone."
        )
    check_token_options(options, query.shape[:2])


def _logits_to_keep(backbone: PreTrainedModel, options: dict[str, Any], has_labels: bool) -> int | Tensor | None:
    """The option `logits_to_keep`; `None` if all logits are requested or the backbone does not support it."""
    keep = options.get("logits_to_keep")
    check_kind("logits_to_keep", keep, int | Tensor | None, "a number of positions or a tensor of their indices")
    if keep is None or (isinstance(keep, int) and not keep):
        return None
    if has_labels:
        raise ValueError(
            "logits_to_keep cannot be combined with labels or max_targets, because the loss needs the logits before "
            "all labels. Leave it out; max_targets computes only the logits that the loss needs."
        )
    return keep if "logits_to_keep" in inspect.signature(backbone.forward).parameters else None


def forward_with_memory(
    backbone: PreTrainedModel,
    prefix: Tensor,
    query: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    max_targets: int | None,
    **options: Any,
) -> GradMemOutput:
    """Run the backbone on `[prefix; query]` and return the query's part of its output.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        prefix (`Tensor`): `[B, P, d]`, placed before each query.
        query (`Tensor`): `[B, T, d]`, the queries' embeddings.
        attention_mask (`Tensor`, *optional*): `[B, T]`, padding on either side.
        labels (`Tensor`, *optional*): `[B, T]`, -100 for tokens without a loss. The first query token is predicted from
            the prefix.
        max_targets (`int`, *optional*): the most labels that count in a query; logits are computed only for them.
        options: further arguments of the backbone's forward.

    Returns:
        `GradMemOutput`: `loss` and `target_loss` (the same), `target_nll`, `logits` `[B, T, V]` (or of the positions in
        `logits_to_keep`); with `max_targets`, `correct` and `target_states` instead of logits.
    """
    check_kind("labels", labels, Tensor | None, "a tensor [batch, length]")
    check_kind("max_targets", max_targets, SupportsIndex | None, "a number of tokens")
    if query.shape[-1] != prefix.shape[-1]:
        raise ValueError(
            f"inputs_embeds must have width {prefix.shape[-1]}, as the model's embeddings, got {query.shape[-1]}."
        )
    if labels is not None and labels.shape != query.shape[:2]:
        raise ValueError(
            f"labels must have the shape of the query, {tuple(query.shape[:2])}, with {IGNORED} for tokens without a "
            f"loss; got {tuple(labels.shape)}."
        )
    check_length(prefix.shape[1], query, attention_mask, backbone)
    read = read_inputs(prefix, query, attention_mask, first_position(backbone))
    layout = read.layout
    check_left_padding(backbone, layout.source is not None)
    keep = _logits_to_keep(backbone, options, labels is not None or max_targets is not None)
    if keep is not None:
        options["logits_to_keep"] = layout.places(keep)
    if labels is not None:
        labels = layout.join(labels.new_full(prefix.shape[:2], IGNORED), labels)
    inputs = {
        "inputs_embeds": read.inputs_embeds,
        "attention_mask": read.attention_mask,
        "position_ids": read.position_ids,
        **options,
        "return_dict": True,
    }
    count = inputs.pop("num_items_in_batch", None)
    if max_targets is None:
        output = fresh(backbone)(**inputs)
        loss, nll = (None, None) if labels is None else loss_of_logits(backbone, output, labels, count)
    else:
        output = forward_at_targets(backbone, labels, max_targets, count, **inputs)
        loss, nll = output.loss, output.target_nll
    logits = output.logits  # None from forward_at_targets
    return GradMemOutput(
        loss=loss,
        logits=logits if logits is None or keep is not None else layout.split(logits),
        past_key_values=output.get("past_key_values"),
        aux_loss=output.get("aux_loss"),
        target_loss=loss,
        target_nll=nll,
        correct=output.get("correct"),
        target_states=output.get("target_states"),
        **layout.split_outputs(output),
    )
