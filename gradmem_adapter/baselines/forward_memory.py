"""Memory written by forward passes: a recurrent memory transformer (Bulatov et al., 2022) that reads one segment."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.ops.padding import append
from gradmem_adapter.read.loss import forward_at_targets

from .prefix_model import Prefix, PrefixModel


class ForwardMemory(PrefixModel):
    """The context is run with memory slots before and behind it; the outputs behind it are the memory.

        M_{k+1} = backbone([M_k; C; M_k]) at the last m places,   M_0 learned

    `write_steps` passes; one is the usual writer, several are the repeated forward writes of the paper's comparison.

    Args:
        num_memory_tokens: m.
        reconstruction_weight: of the loss of the context given the memory, in the outer loss, as for GradMem.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        num_memory_tokens: int,
        reconstruction_weight: float = 0.0,
        memory_init_std: float = 0.02,
    ) -> None:
        super().__init__(backbone)
        self.reconstruction_weight = reconstruction_weight
        width = cast(Tensor, backbone.get_input_embeddings().weight).shape[1]
        self.memory = nn.Parameter(torch.randn(num_memory_tokens, width) * memory_init_std)

    def prefix(self, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The memory [C, m, d] after `steps` passes.

        Raises:
            ValueError: there is no pass.
        """
        if steps < 1:
            raise ValueError(f"Memory of no pass knows nothing of the context: make at least 1 pass, not {steps}.")
        memory = self.memory.expand(len(context), -1, -1)
        embeddings = self.backbone.get_input_embeddings()(context)
        for _ in range(steps):
            tokens, places = append(torch.cat([memory, embeddings], dim=1), lengths + memory.shape[1], memory)
            hidden = self.backbone.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
            memory = hidden.gather(1, places[..., None].expand_as(memory))
        return Prefix(memory, torch.full_like(lengths, memory.shape[1]))

    def auxiliary_loss(self, prefix: Prefix, context: Tensor, mask: Tensor) -> Tensor | None:
        """The loss of the contexts given their memory."""
        if not self.reconstruction_weight:
            return None
        places = prefix.embeddings.shape[:2]
        labels = torch.cat([context.new_full(places, IGNORED), context.masked_fill(mask == 0, IGNORED)], dim=1)
        tokens = torch.cat([prefix.embeddings, self.backbone.get_input_embeddings()(context)], dim=1)
        inputs = {"inputs_embeds": tokens, "use_cache": False, "return_dict": True}
        recited, _ = forward_at_targets(self.backbone, labels, context.shape[1], **inputs)
        return self.reconstruction_weight * cast(Tensor, recited.loss)
