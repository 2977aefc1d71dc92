"""The results of public methods, other than memory states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class WriteProgress(NamedTuple):
    """What a callback of `write` receives before each step and after the last.

    Args:
        step (`int`): the number of steps taken.
        steps (`int`): K, the number of steps to take.
        losses (`Tensor`): `[B]`, the write loss of each sample in nats per token.
        recovered (`Tensor`): `[B]`, the share of context tokens that are the model's first choice, given the true
            tokens before them.
    """

    step: int
    steps: int
    losses: Tensor
    recovered: Tensor


@dataclass
class GradMemOutput(CausalLMOutputWithPast):
    """What `forward` returns: the backbone's output for the query positions, and what WRITE did.

    Args:
        loss (`Tensor`, *optional*): a scalar, the outer loss: target loss + reconstruction_weight x mean last write
            loss.
        logits (`Tensor`, *optional*): `[B, T, V]` of the query positions.
        hidden_states (`tuple[Tensor]`, *optional*): `[B, T, h]` of the query positions, from each layer.
        attentions (`tuple[Tensor]`, *optional*): `[B, heads, T, P + T]` from each layer: the attention of the query
            positions to the P positions of the prefix, which come first unless a query is padded on the left, and to
            each other.
        target_loss (`Tensor`, *optional*): a scalar, the loss on `labels` alone.
        target_nll (`Tensor`, *optional*): `[B]`, the same for each query, summed over its labels.
        write_losses (`Tensor`, *optional*): `[C, K]`, the write loss before each step, if C contexts were written. With
            K=0, `[C, 1]`, that of the memory WRITE starts from, if it has a weight in the loss.
        memory (`Tensor`, *optional*): `[C, m, d]`, the memory after WRITE, if contexts were written.
        correct (`Tensor`, *optional*): `[B]`, with `max_targets`: whether every target token of a query is the model's
            first choice.
        target_states (`Tensor`, *optional*): `[B, n, h]`, with `max_targets`: the last hidden states that predict the
            targets of a query, in order; n is `max_targets`.
        aux_loss, router_logits (*optional*): with `output_router_logits`: the auxiliary loss of routed experts, which
            includes the positions of the prefix, and the router logits `[B x T, experts]` of the query positions from
            each layer, in the backbone's format.
    """

    target_loss: Tensor | None = None
    write_losses: Tensor | None = None
    memory: Tensor | None = None
    correct: Tensor | None = None
    target_states: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    target_nll: Tensor | None = None


class Fidelity(NamedTuple):
    """How much of each context its state gives back, between 0 and 1.

    `teacher_forced` tells how low the write loss got, and can be near 1 while `greedy` is near 0.

    Args:
        greedy (`Tensor`): `[B]`, the share of context tokens that greedy decoding from memory gets back, position by
            position.
        teacher_forced (`Tensor`): `[B]`, the share of context tokens that are the model's first choice, given the true
            tokens before them.
    """

    greedy: Tensor
    teacher_forced: Tensor


class ScoredText(NamedTuple):
    """What `GradMemPipeline.generate(return_scores=True)` returns for each answer.

    Args:
        text (`str`): the answer.
        score (`float`): how well memory supports it, from 0 to 1.
    """

    text: str
    score: float


class SurestAnswer(NamedTuple):
    """What `GradMemPipeline.surest_answer` returns.

    Args:
        text (`str`): the answer.
        score (`float`): how well the state supports it, from 0 to 1.
        state (`int`): the index of the state it comes from.
    """

    text: str
    score: float
    state: int
