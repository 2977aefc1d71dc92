"""How likely answers are after a prefix, which shows how far memory supports them."""

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
def log_likelihood(
    backbone: PreTrainedModel, prefix: Tensor, queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """The mean log-likelihood of each answer y of n tokens after its prefix M and query q:

        s(y)  =  (1/n) sum_t log p(y_t | [M; q; y_<t])

    For the model's own answers it separates what memory holds from what it does not hold better than the ratio to the
    likelihood without memory. For a model trained to refuse, the likelihood of its refusal separates them far better
    (docs/lab/LOG.md).

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        prefix (`Tensor`): `[B, P, d]`; P may be 0 if no query is empty.
        queries, answers (`Sequence`): B rows of token ids; no answer is empty.

    Returns:
        `Tensor`: `[B]`, nats per token.
    """
    states = states_of_answers(backbone, prefix, list(zip(queries, answers, strict=True)))
    targets, mask = (tensor.to(prefix.device) for tensor in pad(answers, "right"))
    vocabulary = backbone.get_output_embeddings().weight.shape[0]
    nll, _ = sequence_nll(
        pad_sequence(states, batch_first=True), targets, mask.bool(), output_head(backbone), vocabulary,
        count_correct=False,
    )  # fmt: skip
    return -nll / mask.sum(1)


def scores(
    log_likelihoods: Tensor, calibration: tuple[float, float] | None, refusal_tokens: int | None = None
) -> Tensor:
    """How far memory supports answers, from 0 to 1: sigmoid(scale * z + offset).

    z is an answer's mean log-likelihood s, and without calibration the score is exp(s). For an adapter that was trained
    to refuse, s is the mean log-likelihood of its refusal of n tokens, z is the log-odds of any other answer, and
    without calibration the score is the probability of any other answer:

        p  =  exp(n s)        z  =  log (1 - p) / p

    Args:
        log_likelihoods (`Tensor`): `[B]`, as `log_likelihood` returns them.
        calibration (`tuple[float, float]`, *optional*): scale and offset, `GradMemConfig.score_calibration`.
        refusal_tokens (`int`, *optional*): n. None: the likelihoods are those of the answers.

    Returns:
        `Tensor`: `[B]`.
    """
    if refusal_tokens is None and calibration is None:
        return log_likelihoods.exp()
    scale, offset = calibration or (1.0, 0.0)
    if refusal_tokens is None:
        return (scale * log_likelihoods + offset).sigmoid()
    refused = (refusal_tokens * log_likelihoods.double()).clamp(max=-1e-12)
    return (scale * (torch.log(-torch.expm1(refused)) - refused) + offset).sigmoid()
