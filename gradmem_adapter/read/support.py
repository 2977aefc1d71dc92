"""How far memory supports an answer: a likelihood ratio, which needs no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gradmem_adapter.ops.answers import states_of_answers
from gradmem_adapter.ops.cross_entropy import sequence_nll
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.ops.padding import pad


@torch.no_grad()
def support(
    backbone: PreTrainedModel, prefix: Tensor, queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """How much likelier each answer y of n tokens is with memory than without, in nats a token:

        s(y)  =  (1/n) sum_t [ log p(y_t | [M; q; y_<t]) - log p(y_t | [q; y_<t]) ]

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        prefix (`Tensor`): `[B, P, d]`, M of each query.
        queries, answers (`Sequence`): B rows of token ids, none empty.

    Returns:
        `Tensor`: `[B]`.
    """
    rows = list(zip(queries, answers, strict=True))
    targets, mask = (tensor.to(prefix.device) for tensor in pad(answers, "right"))
    head, vocabulary = output_head(backbone), backbone.get_output_embeddings().weight.shape[0]

    def log_likelihood(prefix: Tensor) -> Tensor:
        hidden = pad_sequence(states_of_answers(backbone, prefix, rows), batch_first=True)
        nll, _ = sequence_nll(hidden, targets, mask.bool(), head, vocabulary, count_correct=False)
        return -nll / mask.sum(1)

    return log_likelihood(prefix) - log_likelihood(prefix[:, :0])
