"""The write loss L_w(M; C) and its gradient for the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.lora import backward_in_write, write_phase
from gradmem_adapter.ops.cross_entropy import FusedCrossEntropy, sequence_nll
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.utils.backbone import max_positions
from gradmem_adapter.write.context import Context


@dataclass(frozen=True)
class Writer:
    """What a write step needs beside the memory and the context."""

    backbone: PreTrainedModel
    slots: MemorySlots
    adapter: str
    config: GradMemConfig
    fused: FusedCrossEntropy | None = None
    """Given where the output head is not differentiated, and what is before it at most once."""

    @property
    def longest_context(self) -> int | None:
        """How many tokens a context may have: what memory leaves of the backbone's positions. `None`: any number."""
        positions = max_positions(self.backbone)
        return None if positions is None else positions - self.config.prefix_length

    @property
    def trains_head(self) -> bool:
        """Whether the output head that WRITE uses is trained."""
        head = self.slots.write_head(self.adapter) or self.backbone.get_output_embeddings()
        return any(parameter.requires_grad for parameter in head.parameters())

    def losses(self, memory: Tensor, context: Context, recovered: bool = False) -> tuple[Tensor, Tensor | None]:
        """The write loss of each sample (GradMem, section 1 of the design):

            L_w(M; C) = -(1/N) sum_i log p(t_i | [M; t_<i])

        Args:
            memory: [B, m, d].
            context: B contexts.
            recovered: whether the share is wanted that is recovered.

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
            nll, correct = sequence_nll(
                hidden[:, prefix.shape[1] - 1 : -1],
                context.input_ids,
                context.mask,
                head=output_head(self.backbone, self.slots.write_head(self.adapter)),
                vocabulary=self.backbone.get_output_embeddings().weight.shape[0],
                fused=self.fused,
                count_correct=recovered,
            )
        return nll / context.lengths, None if correct is None else correct / context.lengths


def write_gradient(
    writer: Writer, memory: Tensor, context: Context, create_graph: bool = False, recovered: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of each sample's write loss, with the losses and the share recovered it came with.

    Samples do not interact, so the gradient of the summed losses is every sample's own.

    Args:
        memory: [B, m, d], requires grad.
        create_graph: make the gradient differentiable.
        recovered: whether the share is wanted that is recovered.

    Returns:
        gradient [B, m, d], losses [B], recovered [B] or None.
    """
    losses, share = writer.losses(memory, context, recovered)
    with backward_in_write():
        (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=create_graph)
    return gradient, losses, share
