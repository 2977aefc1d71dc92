"""The write loss L_w(M; C) and its gradient for the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.lora import backward_in_write, write_phase
from gradmem_adapter.ops.cross_entropy import FUSED, FusedCrossEntropy, sequence_nll
from gradmem_adapter.ops.output_head import output_head, trains_head
from gradmem_adapter.utils.backbone import fresh, is_compiled, max_positions, trunk
from gradmem_adapter.write.context import Context


@dataclass(frozen=True)
class Writer:
    """A backbone with one of its adapters, as WRITE uses it.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        slots (`MemorySlots`): the layer with the adapter's tensors.
        adapter (`str`): the adapter's name.
        config (`GradMemConfig`): its configuration.
        fused (`FusedCrossEntropy`, *optional*): set if the output head is not differentiated, and everything before it
            at most once.
    """

    backbone: PreTrainedModel
    slots: MemorySlots
    adapter: str
    config: GradMemConfig
    fused: FusedCrossEntropy | None = None

    def prefix_length(self, vectors: int) -> int:
        """How many positions a memory takes, including its control vectors: m + 2c.

        Args:
            vectors (`int`): m; several states side by side have more vectors than the adapter has slots.
        """
        return vectors + 2 * self.config.num_control_tokens

    def longest_context(self, vectors: int) -> int | None:
        """The most tokens in a context: the backbone's positions minus those of the memory. `None`: any number."""
        positions = max_positions(self.backbone)
        return None if positions is None else positions - self.prefix_length(vectors)

    def longest_update(self, vectors: int) -> int | None:
        """How many tokens more text may have, whatever memory recites of the old text: a start that reads contexts
        reads the old memory, the text and the new memory together. `None`: any number."""
        longest = self.longest_context(vectors)
        return longest if longest is None or self.config.start == "slots" else longest - self.config.num_memory_tokens

    @property
    def trains_head(self) -> bool:
        """Whether the output head that WRITE uses is trained, or anything between the trunk and it."""
        return trains_head(self.backbone, self.slots.write_head(self.adapter))

    def losses(self, memory: Tensor, context: Context, recovered: bool = False) -> tuple[Tensor, Tensor | None]:
        """The write loss of each sample (GradMem, arXiv 2603.13875):

            L_w(M; C) = -(1/N) sum_i log p(t_i | [M; t_<i])

        Args:
            memory (`Tensor`): `[B, m, d]`, M.
            context (`Context`): B contexts of N tokens t, C.
            recovered (`bool`, *optional*, defaults to `False`): return the share recovered.

        Returns:
            Losses `[B]` in nats per token, and the share `[B]` of tokens that are the model's first choice, or `None`.
        """
        with write_phase():
            embeddings = self.backbone.get_input_embeddings()(context.input_ids)
            prefix = self.slots.prefix(memory, "write", self.adapter).to(embeddings.dtype)
            # No attention mask: padding is on the right, where a causal model does not look, and without a mask the
            # fastest attention kernels apply.
            hidden = trunk(fresh(self.backbone))(
                inputs_embeds=torch.cat([prefix, embeddings], dim=1), use_cache=False, return_dict=True
            ).last_hidden_state
            # Position P-1, the last of the prefix, predicts t_1; the last token predicts nothing.
            nll, correct = sequence_nll(
                hidden[:, prefix.shape[1] - 1 : -1],
                context.input_ids,
                context.mask,
                head=output_head(self.backbone, self.slots.write_head(self.adapter)),
                vocabulary=self.backbone.get_output_embeddings().weight.shape[0],
                fused=self.fused,
                count_correct=recovered,
                compiled=is_compiled(self.backbone),
            )
        return nll / context.lengths, None if correct is None else correct / context.lengths


class Pass(NamedTuple):
    """The result of one pass through the model for a memory.

    Args:
        gradient (`Tensor`, *optional*): `[B, m, d]`, grad_M L_w(M; C), if requested.
        losses (`Tensor`): `[B]`, L_w(M; C).
        recovered (`Tensor`, *optional*): `[B]`, the share of tokens that are the model's first choice, if requested.
    """

    gradient: Tensor | None
    losses: Tensor
    recovered: Tensor | None


def write_gradient(
    writer: Writer, memory: Tensor, context: Context, create_graph: bool = False, recovered: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The write gradient grad_M L_w(M; C), with the losses and the share recovered from the same pass.

    Samples do not interact, so the gradient of the summed losses contains each sample's own gradient.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`, requires a gradient.
        context (`Context`): B contexts.
        create_graph (`bool`, *optional*, defaults to `False`): make the gradient differentiable.
        recovered (`bool`, *optional*, defaults to `False`): return the share recovered.

    Returns:
        The gradient `[B, m, d]`, losses `[B]`, and the share recovered `[B]` or `None`.
    """
    losses, share = writer.losses(memory, context, recovered)
    with backward_in_write():
        (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=create_graph)
    return gradient, losses, share


def write_pass(writer: Writer, memory: Tensor, context: Context, gradient: bool, recovered: bool) -> Pass:
    """What one step of WRITE needs to know about a memory; no graph is kept.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`.
        context (`Context`): B contexts.
        gradient (`bool`): compute the write gradient.
        recovered (`bool`): return the share recovered.
    """
    writer = replace(writer, fused=writer.fused or FUSED)
    if gradient:
        leaf = memory.detach().requires_grad_()
        slope, losses, share = write_gradient(writer, leaf, context, recovered=recovered)
        return Pass(slope, losses.detach(), share)
    with torch.no_grad():
        return Pass(None, *writer.losses(memory, context, recovered))
