"""From hidden states to logits through the backbone's own code, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from gradmem_adapter.utils.backbone import contains, shallow_copy, trunk, trunk_name


class _HiddenStatesOnly(BaseModelOutputWithPast):
    """An inner model's output with only hidden states: every other field that the outer model reads is `None`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _GivenHiddenStates(nn.Module):
    """Stands in for a backbone's trunk and returns `inputs_embeds` as its last hidden states. All other attributes come
    from the trunk, but a trunk inside it is replaced too (OPT's forward calls `self.model.decoder(...)`)."""

    def __init__(self, trunk: nn.Module, embeddings: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_trunk=trunk, _embeddings=embeddings)  # not registered as children

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return _HiddenStatesOnly(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        if "_trunk" not in self.__dict__:  # before __init__ has run
            raise AttributeError(name)
        found = getattr(self._trunk, name)
        if isinstance(found, nn.Module) and found is not self._embeddings and contains(found, self._embeddings):
            return _GivenHiddenStates(found, self._embeddings)
        return found


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
        ValueError: the replacement and the backbone differ in their number of tokens.
        NotImplementedError: the output embeddings are not a direct child of the model, so they cannot be replaced.
    """
    top = cast(PreTrainedModel, shallow_copy(backbone))
    top._modules[trunk_name(backbone)] = _GivenHiddenStates(trunk(backbone), backbone.get_input_embeddings())
    if replacement is not None:
        names = [name for name, child in backbone._modules.items() if child is backbone.get_output_embeddings()]
        if not names:
            raise NotImplementedError(
                f"write_head needs the output embeddings of {type(backbone).__name__} to be a direct child of the "
                "model, and they are not. Use write_head=False."
            )
        rows, tokens = (len(cast(Tensor, h.weight)) for h in (replacement, backbone.get_output_embeddings()))
        if rows != tokens:
            raise ValueError(
                f"The write head has {rows} tokens but the backbone has {tokens}: the backbone was resized after the "
                "adapter was created. Resize the backbone before you attach the adapter, or use write_head=False."
            )
        top._modules[names[0]] = replacement
    forward = type(backbone).forward  # not `top(...)`: hooks and wrappers around the model belong to the model

    def logits(hidden: Tensor) -> Tensor:
        if replacement is not None:
            hidden = hidden.to(next(replacement.parameters()).dtype)
        return forward(top, inputs_embeds=hidden, use_cache=False, return_dict=True).logits

    return logits


def trains_head(backbone: PreTrainedModel, replacement: nn.Module | None = None) -> bool:
    """Whether anything between the trunk and the logits is trained: the output embeddings, or the layers before them in
    models such as BERT.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        replacement (`nn.Module`, *optional*): the layer that replaces its output embeddings.
    """
    unused = [trunk(backbone)] if replacement is None else [trunk(backbone), backbone.get_output_embeddings()]
    parts = [part for part in (replacement, *backbone.children()) if part is not None and part not in unused]
    return any(
        parameter.requires_grad
        for part in parts
        # A tuner layer without a base layer (the memory slots) is not on the path to the logits.
        if not isinstance(part, BaseTunerLayer) or hasattr(part, "base_layer")
        for parameter in part.parameters()
    )
