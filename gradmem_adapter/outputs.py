"""What the public methods return, beside memory states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class WriteProgress(NamedTuple):
    """What a callback of `write` is given before each step and after the last."""

    step: int
    steps: int
    losses: Tensor
    """[B], the write loss of each sample."""
    recovered: Tensor
    """[B], the share of context tokens that are the model's first choice given the true tokens before them."""


@dataclass
class GradMemOutput(CausalLMOutputWithPast):
    """What `forward` returns: the backbone's output for the query positions, and what WRITE did.

    Attributes:
        loss: the outer loss: target loss + reconstruction_weight x mean last write loss.
        target_loss: the loss on `labels` alone.
        write_losses: [contexts, K], the write losses before each step, where a context was written;
            [contexts, 1] with K=0, that of the memory WRITE starts from, where this has a weight in the loss.
        memory: [contexts, m, d], the memory after WRITE, where a context was written.
        correct: [B], with `max_targets`: whether every target token of a query is the model's first choice.
    """

    target_loss: Tensor | None = None
    write_losses: Tensor | None = None
    memory: Tensor | None = None
    correct: Tensor | None = None


class Fidelity(NamedTuple):
    """How much of each context its state gives back, [B] each, between 0 and 1.

    `teacher_forced` says how good the write loss got and can be near 1 where `greedy` is near 0.
    """

    greedy: Tensor
    """Share of context tokens that greedy decoding from memory gets back, place by place."""
    teacher_forced: Tensor
    """Share of context tokens that are the model's first choice when shown the true tokens before them."""
