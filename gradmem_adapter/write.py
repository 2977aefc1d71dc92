"""WRITE: the write loss, one write step, and the loop over steps. No autograd tricks: those are in meta_gradient.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checks import capturing, checkpointing
from .config import GradMemConfig
from .lora_phase import backward_in_write, write_phase
from .output_head import output_head
from .packing import append, part_means
from .slots import MemorySlots
from .token_losses import PLAIN, Once, token_losses


class Context(NamedTuple):
    """A batch of contexts, right padded: `input_ids` [B, N], `lengths` [B] (tokens that count)."""

    input_ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, N], True where a token counts."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]


class WriteProgress(NamedTuple):
    """What a callback of `write` is given before each step and after the last."""

    step: int
    steps: int
    losses: Tensor
    """[B], the write loss of each sample."""
    recovered: Tensor
    """[B], the share of context tokens that are the model's first choice given the true tokens before them."""


@dataclass(frozen=True)
class Writer:
    """What a write step needs beside the memory and the context."""

    backbone: PreTrainedModel
    slots: MemorySlots
    adapter: str
    config: GradMemConfig
    once: Once | None = None
    """Given where the output head is not differentiated, and what is before it once."""

    @property
    def prefix_length(self) -> int:
        """How many positions the memory takes with its control vectors, m + 2c."""
        return self.config.num_memory_tokens + 2 * self.config.num_control_tokens

    @property
    def trains_head(self) -> bool:
        """Whether the output head that WRITE uses is trained."""
        head = self.slots.write_head(self.adapter) or self.backbone.get_output_embeddings()
        return any(parameter.requires_grad for parameter in head.parameters())

    def start(self, context: Context) -> Tensor:
        """The memory [B, m, d] that WRITE of B contexts starts from: the slots M_0, or with `start_from_context`

            M_0(C) = S + gain * h_S,    [h_C; h_S] = backbone([C; S]),    S = M_0,

        h being the last hidden states; so that the gradient steps begin at what a forward-only writer knows (Bulatov et
        al., 2022). With `start_pooling` the j-th of m equal parts of C, P_j, is averaged into vector j:

            S_j = M_0j + pool_gain * mean(embeddings of P_j),
            M_0(C)_j = S_j + gain * (h_Sj + mean(h_C of P_j))    the last term with "hidden_states" alone.
        """
        slots = self.slots.gradmem_memory[self.adapter].expand(len(context.input_ids), -1, -1)
        if not self.config.start_from_context:
            return slots
        if self.config.lora_phase != "both" and torch.is_grad_enabled() and checkpointing(self.backbone):
            # What the outer backward pass computes again is READ, and there is no hook to say otherwise.
            raise NotImplementedError(
                "start_from_context cannot be trained with gradient checkpointing and a LoRA of one phase together: "
                "use lora_phase='both', or do without checkpointing."
            )
        with write_phase():
            embeddings = self.backbone.get_input_embeddings()(context.input_ids)
            if self.config.start_pooling != "none":
                means, _ = part_means(embeddings.to(slots.dtype), context.lengths, slots.shape[1])
                slots = slots + self.slots.gradmem_pool_gain[self.adapter] * means
            tokens, places = append(embeddings, context.lengths, slots.to(embeddings.dtype))
            hidden = self.backbone.base_model(inputs_embeds=tokens, use_cache=False, return_dict=True).last_hidden_state
        read = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).to(slots.dtype)
        if self.config.start_pooling == "hidden_states":
            read = read + part_means(hidden.to(slots.dtype), context.lengths, slots.shape[1])[0]
        return slots + self.slots.gradmem_start_gain[self.adapter] * read

    def losses(self, memory: Tensor, context: Context, first: bool = False) -> tuple[Tensor, Tensor | None]:
        """The write loss of each sample (GradMem, section 1 of the design):

            L_w(M; C) = -(1/N) sum_i log p(t_i | [M; t_<i])

        Args:
            memory: [B, m, d].
            context: B contexts.
            first: whether `recovered` is wanted.

        Returns:
            losses [B] and recovered [B], the share of tokens that are the model's first choice, or None.
        """
        with write_phase():
            embeddings = self.backbone.get_input_embeddings()(context.input_ids)
            prefix = self.slots.prefix(memory, "write", self.adapter).to(embeddings.dtype)
            # No attention mask: padding is on the right, where a causal model does not look, and without a mask the
            # fastest attention kernels apply.
            hidden = self.backbone.base_model(
                inputs_embeds=torch.cat([prefix, embeddings], dim=1), use_cache=False, return_dict=True
            ).last_hidden_state
            # Position P-1, the last of the prefix, predicts t_1; the last token predicts nothing.
            nll, hits = token_losses(
                hidden[:, prefix.shape[1] - 1 : -1],
                context.input_ids,
                context.mask,
                head=output_head(self.backbone, self.slots.write_head(self.adapter)),
                vocabulary=self.backbone.get_output_embeddings().weight.shape[0],
                once=self.once,
                first=first,
            )
        return nll / context.lengths, None if hits is None else hits / context.lengths

    def clip(self, gradient: Tensor) -> Tensor:
        """Each sample's write gradient [B, m, d], clipped by element value, then by norm, as configured."""
        if (limit := self.config.write_clip_value) is not None:
            gradient = gradient.clamp(-limit, limit)
        if (limit := self.config.write_clip_norm) is not None:
            norm = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
            gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1.0)
        return gradient


Rate: TypeAlias = Tensor | float
"""A write learning rate: a number, or one for each element of the memory [m, d]."""


class WriteState(NamedTuple):
    """The memory [B, m, d] and what the write optimizer carries from step to step (zeros for sgd)."""

    memory: Tensor
    mean: Tensor
    square: Tensor
    step: int

    @classmethod
    def start(cls, memory: Tensor) -> WriteState:
        return cls(memory, torch.zeros_like(memory), torch.zeros_like(memory), 0)


def sgd(state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
    """One write step: M_{k+1} = M_k - a * grad_M L_w(M_k; C)."""
    return state._replace(memory=state.memory - lr * gradient, step=state.step + 1)


def adam(state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
    """One write step by Adam (Kingma and Ba, 2015, algorithm 1), betas 0.9 and 0.999, per element of the memory."""
    step = state.step + 1
    mean = 0.9 * state.mean + 0.1 * gradient
    square = 0.999 * state.square + 0.001 * gradient**2
    # The epsilon is inside the root so that the root has a derivative where a gradient is zero.
    scale = (square / (1 - 0.999**step) + 1e-16).sqrt()
    return WriteState(state.memory - lr * mean / (1 - 0.9**step) / scale, mean, square, step)


_UPDATES: dict[str, Callable[[WriteState, Tensor, Tensor | float], WriteState]] = {"sgd": sgd, "adam": adam}


def write_gradient(
    writer: Writer, memory: Tensor, context: Context, create_graph: bool = False, first: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of each sample's write loss, with the losses and the share recovered it came with.

    Samples do not interact, so the gradient of the summed losses is every sample's own.

    Args:
        memory: [B, m, d], requires grad.
        create_graph: make the gradient differentiable.
        first: whether `recovered` is wanted.

    Returns:
        gradient [B, m, d], losses [B], recovered [B] or None.
    """
    losses, recovered = writer.losses(memory, context, first)
    with backward_in_write():
        (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=create_graph)
    return gradient, losses, recovered


def write_step(
    writer: Writer, state: WriteState, gradient: Tensor, lr: Rate, optimizer: str | None = None
) -> WriteState:
    """One write step with a gradient [B, m, d] as it came: clipped, then handed to the write optimizer."""
    return _UPDATES[optimizer or writer.config.write_optimizer](state, writer.clip(gradient), lr)


def rate_at(lrs: Sequence[Rate], step: int) -> Rate:
    """The write learning rate of a step: its own, or the last where there are fewer."""
    return lrs[min(step, len(lrs) - 1)]


WritePass: TypeAlias = Callable[[Tensor, Context, bool, bool], tuple[Tensor | None, Tensor, Tensor | None]]
"""`write_pass` for one writer: memory [B, m, d], contexts, whether the gradient and `recovered` are wanted."""


def write_pass(
    writer: Writer, memory: Tensor, context: Context, gradient: bool, first: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What one step of WRITE needs to know of a memory, with no graph kept.

    Returns:
        the write gradient [B, m, d] (None unless `gradient`), losses [B] and recovered [B] (None unless `first`).
    """
    writer = replace(writer, once=writer.once or PLAIN)
    if gradient:
        slope, losses, recovered = write_gradient(writer, memory.detach().requires_grad_(), context, first=first)
        return slope, losses.detach(), recovered
    with torch.no_grad():
        return None, *writer.losses(memory, context, first)


def write_memory(
    writer: Writer,
    memory: Tensor,
    context: Context,
    *,
    steps: int,
    lrs: Sequence[Rate],
    optimizer: str,
    tolerance: float | None = None,
    stop_when_recovered: bool = False,
    last_loss: bool = True,
    callback: Callable[[WriteProgress], None] | None = None,
    run: WritePass | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """WRITE: `steps` write steps from `memory`, with no graph kept.

    A sample stops early, at the best of its last two memories, when a step lowered its loss by less than `tolerance`
    times the loss, when every token is recovered (if asked for), or when its loss is no longer finite. The others go
    on. On a GPU nothing is waited for unless samples may stop.

    Args:
        memory: [B, m, d], where to start.
        context: B contexts.
        lrs: write learning rates of the first steps; later ones use the last.
        last_loss: False spares the forward pass over what the last step wrote, whose loss is NaN then.
        run: a faster `write_pass`.

    Returns:
        memory [B, m, d]; losses [B, steps + 1], before each step and after the last that was run for any sample; and
        diverged [B, steps + 1], True where a sample's loss was first not finite, for `warn_diverged`.
    """
    run = run or partial(write_pass, writer)
    may_stop = tolerance is not None or stop_when_recovered
    first = stop_when_recovered or callback is not None
    with torch.inference_mode(False), torch.enable_grad():
        # Clones: tensors made under inference_mode cannot take part in autograd, clones made outside it can.
        context = Context(context.input_ids.clone(), context.lengths.clone())
        state = WriteState.start(memory.detach().clone())
        active = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
        # What a sample keeps: its memory at the last loss that counted.
        kept, kept_loss = state.memory, torch.full((len(memory),), math.inf, device=memory.device)
        history: list[Tensor] = []
        diverged: list[Tensor] = []
        for step in range(steps + 1):
            if step == steps and not last_loss:
                written = active & state.memory.isfinite().all(dim=2).all(dim=1)
                kept = torch.where(written[:, None, None], state.memory, kept)
                history.append(torch.full_like(kept_loss, math.nan))
                diverged.append(active & ~written)
                break
            gradient, losses, recovered = run(state.memory, context, step < steps, first)
            losses = losses.float()
            finite = losses.isfinite()
            diverged.append(active & ~finite)
            better = finite if tolerance is None else finite & (losses <= kept_loss)
            stalled = torch.zeros_like(active) if tolerance is None else losses > kept_loss * (1 - tolerance)
            kept = torch.where((active & better)[:, None, None], state.memory, kept)
            kept_loss = torch.where(active & better, losses, kept_loss)
            active = active & finite & ~stalled
            history.append(kept_loss)
            if recovered is not None:
                if callback is not None:
                    callback(WriteProgress(step, steps, kept_loss, recovered.float()))
                if stop_when_recovered:
                    active = active & (recovered < 1)
            # Reading `active` waits for the GPU, so it is read only where samples may stop.
            if gradient is None or (may_stop and not active.any()):
                break
            state = write_step(writer, state, gradient, rate_at(lrs, step), optimizer)
        return kept, torch.stack(history, dim=1), torch.stack(diverged, dim=1)


_names: ContextVar[Sequence[int] | None] = ContextVar("gradmem_sample_names", default=None)


@contextmanager
def sample_names(names: Sequence[int]) -> Iterator[None]:
    """Warnings about samples inside call them by these numbers, not by their places in the batch."""
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


def warn_diverged(diverged: Tensor) -> None:
    """Name the samples and steps at which losses were no longer finite. Args: as `write_memory` returns it."""
    if not diverged.any():
        return
    called = _names.get() or range(len(diverged))
    for step, samples in enumerate(diverged.cpu().unbind(1)):
        if samples.any():
            names = ", ".join(str(i) for i in sorted(called[j] for j in samples.nonzero().flatten().tolist()))
            warnings.warn(
                f"WRITE: the write loss of sample {names} is not finite after {step} steps; its memory is the one "
                "before, the last with a finite loss. Use a lower write learning rate, or write_clip_norm.",
                RuntimeWarning,
                stacklevel=3,
            )


def right_padded(input_ids: Tensor, attention_mask: Tensor | None) -> Context:
    """Contexts with padding wherever it was, moved to the right.

    Args:
        input_ids: [B, N]; attention_mask: [B, N], 1 where a token counts, or None where all do.
    """
    if attention_mask is None:
        return Context(input_ids, torch.full_like(input_ids[:, 0], input_ids.shape[1]))
    mask = attention_mask.bool()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    lengths = mask.sum(1)
    longest = input_ids.shape[1] if capturing() else int(lengths.max())
    return Context(input_ids.gather(1, order)[:, :longest], lengths)
