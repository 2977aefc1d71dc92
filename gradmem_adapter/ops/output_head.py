"""From hidden states to logits by the backbone's own code, a few positions at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


class _HiddenStatesOnly(BaseModelOutputWithPast):
    """An inner model's output that has nothing but hidden states, whatever the outer model asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _GivenHiddenStates(nn.Module):
    """Stands in for a backbone's inner model and returns `inputs_embeds` as its last hidden states."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return _HiddenStatesOnly(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return self  # some models reach inside, as OPT's forward calls `self.model.decoder(...)`


def output_head(backbone: PreTrainedModel, replacement: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    """The map from hidden states `[..., n, h]` to logits `[..., n, V]` of a causal LM.

    Between the inner model and the logits a causal LM may also scale or cap (Gemma, Cohere, Granite). To stay right
    for all of them without a list of architectures, the model's own `forward` runs on a shallow copy of its top
    module, in which the inner model is replaced by one that returns the given hidden states. The model itself is
    not touched.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        replacement (`nn.Module`, *optional*): a linear layer `[h]` to `[V]` in place of the model's output embeddings
            (the write head).

    Returns:
        `Callable`: the map, which may be called for any part of the positions.

    Raises:
        NotImplementedError: the output embeddings are not a direct child of the model, so they cannot be replaced.
    """
    top = copy.copy(backbone)
    top.__dict__["_modules"] = dict(backbone._modules)
    top._modules[backbone.base_model_prefix] = _GivenHiddenStates()
    if replacement is not None:
        names = [name for name, child in backbone._modules.items() if child is backbone.get_output_embeddings()]
        if not names:
            raise NotImplementedError(
                f"write_head needs the output embeddings of {type(backbone).__name__} to be a direct child of the "
                "model, and they are not. Use write_head=False."
            )
        top._modules[names[0]] = replacement
    forward = type(backbone).forward  # not `top(...)`: hooks and wrappers around the model belong to the model

    def logits(hidden: Tensor) -> Tensor:
        if replacement is not None:
            hidden = hidden.to(next(replacement.parameters()).dtype)
        return forward(top, inputs_embeds=hidden, use_cache=False, return_dict=True).logits

    return logits
