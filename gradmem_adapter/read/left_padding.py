"""Backbones that count padding on the left as text. READ refuses such batches, because it would read them wrongly."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradmem_adapter.read.prefix import read_inputs
from gradmem_adapter.utils.backbone import first_position, fresh
from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.trial import distance, sample_tokens, tolerance, trial_of

_counting_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def check_left_padding(backbone: PreTrainedModel, padded: bool) -> None:
    """Raise if queries are padded on the left and the backbone would read them wrongly: it has absolute positions and
    takes no `position_ids` (such as BART), or reads padding into its state (RecurrentGemma, xLSTM).

    Args:
        backbone (`PreTrainedModel`): the causal LM, which is tested on a few tokens the first time.
        padded (`bool`): whether there is padding on the left of a query.

    Raises:
        NotImplementedError: the backbone would read them wrongly.
    """
    if not padded or capturing():
        return
    if backbone not in _counting_padding:
        _counting_padding[backbone] = counts_padding(backbone)
    if _counting_padding[backbone]:
        raise NotImplementedError(
            f"{type(backbone).__name__} counts padding on the left as text: it takes no position_ids, or no mask. "
            "Queries padded there would be read wrongly. In generate(), pass prompts of the same length, without "
            "padding; in forward(), pad queries on the right."
        )


@torch.compiler.disable  # a trial sets PyTorch's compile stance, which compiled code must not do
def counts_padding(backbone: PreTrainedModel) -> bool:
    """Whether padding on the left changes logits, tested with two forward passes over a few tokens."""
    padding, start = 2, 2
    with trial_of(backbone) as copied, torch.no_grad():
        backbone = fresh(copied)
        tokens = backbone.get_input_embeddings()(sample_tokens(backbone, rows=1))[:, :-padding]
        query = F.pad(tokens[:, start:], (0, 0, padding, 0))
        mask = F.pad(torch.ones_like(tokens[:, start:, 0], dtype=torch.long), (padding, 0))
        read = read_inputs(tokens[:, :start], query, mask, first_position(backbone))
        logits = backbone(
            inputs_embeds=read.inputs_embeds, attention_mask=read.attention_mask, position_ids=read.position_ids,
            return_dict=True,
        ).logits  # fmt: skip
        expected = backbone(inputs_embeds=tokens, return_dict=True).logits
    return distance(logits[:, padding:], expected) > tolerance(backbone)
