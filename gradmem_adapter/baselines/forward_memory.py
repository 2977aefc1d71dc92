"""Memory written by forward passes: a recurrent memory transformer (Bulatov et al., 2022) that reads one segment."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradmem_adapter.model import GradMemOutput
from gradmem_adapter.read import read_inputs

from .packing import append


class ForwardMemory(nn.Module):
    """The context is run with memory slots before and behind it; the outputs behind it are the memory.

        M_{k+1} = backbone([M_k; C; M_k]) at the last m places,   M_0 learned

    `write_steps` passes; one is the usual writer, several are the repeated forward writes of the paper's comparison.

    Args:
        backbone: trained throughout.
        num_memory_tokens: m.
        write_steps: passes where a call does not say.
        reconstruction_weight: of the loss of the context given the memory, in the outer loss, as for GradMem.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        num_memory_tokens: int,
        write_steps: int = 1,
        reconstruction_weight: float = 0.0,
        memory_init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.write_steps = write_steps
        self.reconstruction_weight = reconstruction_weight
        width = cast(Tensor, backbone.get_input_embeddings().weight).shape[1]
        self.memory = nn.Parameter(torch.randn(num_memory_tokens, width) * memory_init_std)

    def write(self, context: Tensor, mask: Tensor, steps: int) -> Tensor:
        """The memory [B, m, d] of right-padded contexts [B, N]."""
        memory = self.memory.expand(len(context), -1, -1)
        embeddings, lengths = self.backbone.get_input_embeddings()(context), mask.sum(1)
        for _ in range(steps):
            tokens, places = append(torch.cat([memory, embeddings], dim=1), lengths + memory.shape[1], memory)
            hidden = self.backbone.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
            memory = hidden.gather(1, places[..., None].expand_as(memory))
        return memory

    def forward(
        self,
        input_ids: Tensor,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        context_index: Tensor,
        labels: Tensor,
        write_steps: int | None = None,
    ) -> GradMemOutput:
        """As `GradMemModel.forward`: queries [R, T] on contexts [B, N]."""
        steps = self.write_steps if write_steps is None else write_steps
        memory = self.write(context_input_ids, context_attention_mask, steps)
        embedding = self.backbone.get_input_embeddings()
        read = read_inputs(memory[context_index], embedding(input_ids), None)
        output = self.backbone(
            inputs_embeds=read.inputs_embeds, labels=_behind(memory, labels), use_cache=False, return_dict=True
        )
        loss = output.loss
        if self.reconstruction_weight and torch.is_grad_enabled():
            recited = self.backbone(
                inputs_embeds=torch.cat([memory, embedding(context_input_ids)], dim=1),
                labels=_behind(memory, context_input_ids.masked_fill(context_attention_mask == 0, -100)),
                use_cache=False,
                return_dict=True,
            )
            loss = loss + self.reconstruction_weight * recited.loss
        return GradMemOutput(loss=loss, target_loss=output.loss, logits=read.layout.split(output.logits), memory=memory)


def _behind(memory: Tensor, labels: Tensor) -> Tensor:
    """Labels [R, T] of tokens that stand behind a memory [., m, d]: [R, m + T]."""
    return torch.cat([labels.new_full((len(labels), memory.shape[1]), -100), labels], dim=1)
