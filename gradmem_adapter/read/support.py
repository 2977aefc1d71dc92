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
    with_memory, without = (log_likelihood(backbone, p, queries, answers) for p in (prefix, prefix[:, :0]))
    return with_memory - without


@torch.no_grad()
def log_likelihood(
    backbone: PreTrainedModel, prefix: Tensor, queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """The mean log-likelihood of each answer's tokens, log p(y_t | [prefix; q; y_<t]), `[B]` in nats.

    Args:
        backbone, queries, answers: as for `support`.
        prefix (`Tensor`): `[B, P, d]`; P may be 0 where no query is empty.
    """
    states = states_of_answers(backbone, prefix, list(zip(queries, answers, strict=True)))
    targets, mask = (tensor.to(prefix.device) for tensor in pad(answers, "right"))
    vocabulary = backbone.get_output_embeddings().weight.shape[0]
    nll, _ = sequence_nll(
        pad_sequence(states, batch_first=True), targets, mask.bool(), output_head(backbone), vocabulary,
        count_correct=False,
    )  # fmt: skip
    return -nll / mask.sum(1)
