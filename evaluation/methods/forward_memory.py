"""Memory written by forward passes: a recurrent memory transformer (Bulatov et al., 2022) that reads one segment."""

from __future__ import annotations

from typing import Any, cast

import pydantic
import torch
from torch import Tensor

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.ops.padding import append
from gradmem_adapter.read.loss import forward_at_targets

from .base import OPTIONS
from .prefix import Prefix, PrefixMethod, PrefixModel


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class ForwardMemory(PrefixMethod):
    """Runs the backbone on the context with memory slots before and after it; the outputs at the latter are the memory.

        M_{k+1} = backbone([M_k; C; M_k]) at the last m positions,   M_0 learned

    There are K passes: one is the usual writer, several are the repeated forward writes of the paper's comparison. The
    loss of the context given its memory has the weight `reconstruction_weight`, as for GradMem.
    """

    name = "forward_memory"
    title = "forward-only memory"
    color, marker = "#d55e00", "s"
    step = "pass"
    slots = True

    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The memory [C, m, d] after `steps` passes.

        Raises:
            ValueError: `steps` is less than 1.
        """
        if steps < 1:
            raise ValueError(f"forward_memory needs at least 1 pass to know the context, got {steps}.")
        memory = cast(Tensor, model.slots).expand(len(context), -1, -1)
        embeddings = model.embed(context)
        for _ in range(steps):
            tokens, places = append(torch.cat([memory, embeddings], dim=1), lengths + memory.shape[1], memory)
            hidden = model.backbone.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
            memory = hidden.gather(1, places[..., None].expand_as(memory))
        return Prefix(memory, torch.full_like(lengths, memory.shape[1]))

    def auxiliary_loss(self, model: PrefixModel, prefix: Prefix, context: Tensor, mask: Tensor) -> Tensor | float:
        """The loss of the contexts given their memory."""
        if not model.reconstruction_weight:
            return 0.0
        places = prefix.embeddings.shape[:2]
        labels = torch.cat([context.new_full(places, IGNORED), context.masked_fill(mask == 0, IGNORED)], dim=1)
        tokens = torch.cat([prefix.embeddings, model.embed(context)], dim=1)
        inputs: dict[str, Any] = {"inputs_embeds": tokens, "use_cache": False, "return_dict": True}
        recited = forward_at_targets(model.backbone, labels, context.shape[1], **inputs)
        return model.reconstruction_weight * cast(Tensor, recited.loss)
