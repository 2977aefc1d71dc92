"""What a backbone must be so that GradMem can be attached to it, and what is asked of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.wording import counted

Module = TypeVar("Module", bound=nn.Module)


def check_backbone(model: object) -> None:
    """Raise unless a model is a causal language model of Transformers without an adapter.

    Args:
        model (`object`): what an adapter is to be attached to.

    Raises:
        TypeError: it is no such model.
        ValueError: it carries an adapter.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"GradMem attaches to a causal language model of Transformers, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} carries an adapter already ({', '.join(_adapters(model)) or 'of unknown name'}), "
            "which PEFT would mix up with this one. To start over, load the backbone again, or take what "
            "model.unload() returns. To keep it, merge it into the weights: "
            "PeftModel.from_pretrained(backbone, adapter).merge_and_unload(). A LoRA to train with the memory goes "
            "into GradMemConfig(lora_config=...), a further GradMem adapter into model.add_adapter(name, config)."
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder model; GradMem needs a decoder-only causal language model."
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise TypeError(
            f"{type(model).__name__} has no language-model head to generate with; load the checkpoint with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if not all(hasattr(table, "weight") for table in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise TypeError(
            f"{type(model).__name__} has several tables of embeddings for a token (as models of audio codebooks do); "
            "GradMem needs a causal language model with one."
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise TypeError(
            f"{type(model).__name__} attends in both directions (config.is_decoder is not set), so a write loss would "
            "see the tokens it predicts; GradMem needs a causal language model."
        )
    trunk_name(model)


def _adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that a model carries."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def trunk_name(backbone: PreTrainedModel) -> str:
    """The name of the child that maps input embeddings to last hidden states, which the output head reads.

    `base_model_prefix` where a child has it; some classes name one that they do not have, or that of a larger model.

    Raises:
        TypeError: there is none.
    """
    if isinstance(backbone._modules.get(backbone.base_model_prefix), nn.Module):
        return backbone.base_model_prefix
    embeddings = backbone.get_input_embeddings()
    for name, child in backbone._modules.items():
        if child is not None and child is not embeddings and contains(child, embeddings):
            return name
    raise TypeError(
        f"{type(backbone).__name__} has no part of its own between input embeddings and output head, which WRITE needs "
        "for the last hidden states."
    )


def trunk(backbone: PreTrainedModel) -> nn.Module:
    """The child that maps input embeddings to last hidden states."""
    return cast(nn.Module, backbone._modules[trunk_name(backbone)])


def fresh(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without what an earlier call left in it, which stays for whoever goes on from that call.

    Qwen2-VL and its kin keep by how much the positions behind images are off (`rope_deltas`), and add it to those of
    input embeddings, whatever their batch. These get a copy of the two modules on top that shares all others.

    Args:
        backbone (`PreTrainedModel`): stays as it is.
    """
    inner = trunk(backbone)
    if "rope_deltas" not in inner.__dict__:
        return backbone
    top, copied = shallow_copy(backbone), shallow_copy(inner)
    copied.__dict__["rope_deltas"] = None
    top._modules[trunk_name(backbone)] = copied
    return cast(PreTrainedModel, top)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that has the same parts, parameters and buffers; a hook of accelerate's acts on the copy.

    Args:
        module (`nn.Module`): stays as it is.
    """
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    for name, value in module.__dict__.items():  # what offloading put in the place of forward is bound to the module
        if isinstance(value, MethodType) and value.__self__ is module:
            copied.__dict__[name] = MethodType(value.__func__, copied)
        elif isinstance(value, partial) and value.args[:1] == (module,):
            copied.__dict__[name] = rebound = partial(value.func, copied, *value.args[1:], **value.keywords)
            rebound.__dict__.update(value.__dict__)
    return copied


def with_replaced(module: Module, replaced: Callable[[nn.Module], nn.Module | None]) -> Module:
    """A model with other modules in the places of some. Modules above these are copied and nowhere else, so that other
    threads see no change.

    Args:
        module (`nn.Module`): the model, or a part of it; stays as it is.
        replaced (`Callable`): gives what stands for a module, or None, which leaves it.
    """
    if (other := replaced(module)) is not None:
        return cast(Module, other)
    children = {name: child and with_replaced(child, replaced) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    result = shallow_copy(module)
    result.__dict__["_modules"] = children
    return cast(Module, result)


def device_of(backbone: PreTrainedModel) -> torch.device:
    """Where a backbone takes token ids: at its embeddings, or where accelerate brings these when they are needed."""
    embeddings = backbone.get_input_embeddings()
    if has_offloaded_params(embeddings):
        return torch.device(cast(Any, embeddings)._hf_hook.execution_device)
    return cast(Tensor, embeddings.weight).device


def check_start(backbone: PreTrainedModel, start: str) -> None:
    """Raise `ValueError` unless the last hidden states are as wide as the input embeddings, so that a memory can start
    from both. Two tokens are run through the trunk to see it.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        start (`str`): `GradMemConfig.start`, for the message.
    """
    embeddings = backbone.get_input_embeddings()
    device = device_of(backbone)
    if device.type == "meta":
        return
    with device, torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        tokens = embeddings(torch.zeros(1, 2, dtype=torch.long, device=device))
        hidden = trunk(fresh(backbone))(inputs_embeds=tokens, use_cache=False, return_dict=True).last_hidden_state
    if hidden.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"start={start!r} adds last hidden states to memory slots, and those of {type(backbone).__name__} are "
            f"{hidden.shape[-1]} wide where its input embeddings are {tokens.shape[-1]}. Use start='slots'."
        )


def contains(module: nn.Module, part: nn.Module) -> bool:
    """Whether a module is `part` or has it inside."""
    return any(found is part for found in module.modules())


_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configurations call the number of positions: most of them, MPT's, Whisper's."""


def max_positions(backbone: PreTrainedModel) -> int | None:
    """How many positions a backbone has for tokens, `None` where it does not say or has no bound."""
    config = backbone.config.get_text_config()
    positions = next((getattr(config, name) for name in _POSITIONS if hasattr(config, name)), None)
    return positions - first_position(backbone) if isinstance(positions, int) and positions > 0 else None


def turns_by_length(backbone: PreTrainedModel) -> bool:
    """Whether keys are turned (RoPE) otherwise in a longer sequence, those of its first tokens, too: Phi-3's longrope
    has other angles behind a length.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
    """
    rope = getattr(backbone.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one for all layers, or for each type
    return any(kind.get("rope_type") == "longrope" for kind in kinds)


_first_positions: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
"""Of the backbones that were asked for it: it is in the path of every WRITE and READ, and a walk over all modules."""


def first_position(backbone: PreTrainedModel) -> int:
    """The position of a first token: 0, and behind the padding's where that has a position (RoBERTa and its kin)."""
    if backbone not in _first_positions:
        _first_positions[backbone] = _find_first_position(backbone)
    return _first_positions[backbone]


def _find_first_position(backbone: PreTrainedModel) -> int:
    tokens = backbone.get_input_embeddings()
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module is not tokens:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def check_length(
    prefix_length: int,
    query: Tensor,
    attention_mask: Tensor | None,
    backbone: PreTrainedModel,
    name: str = "A query",
) -> None:
    """Raise `ValueError` where a prefix and a query behind it are longer than the backbone has positions.

    Args:
        prefix_length (`int`): P.
        query (`Tensor`): `[B, T, ...]`.
        attention_mask (`Tensor`, *optional*): `[B, T]`, 1 where a query token counts.
        backbone (`PreTrainedModel`): the causal LM.
        name (`str`, *optional*, defaults to `"A query"`): what is read, for the message.
    """
    positions, length = max_positions(backbone), query.shape[1]
    if positions is None or prefix_length + length <= positions or capturing():
        return
    longest = length if attention_mask is None else int(attention_mask.bool().sum(1).max())
    if prefix_length + longest > positions:
        raise ValueError(
            f"{name} has {counted(longest, 'token')}, but at most {max(0, positions - prefix_length)} are allowed: "
            f"the model has {positions} positions, {prefix_length} of them for the memory. Shorten the query, or read "
            "fewer states side by side."
        )


def uses_checkpointing(backbone: PreTrainedModel) -> bool:
    """Whether the backbone's layers are computed again in backward passes (gradient checkpointing)."""
    return backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())


def attention_windows(backbone: PreTrainedModel) -> list[int]:
    """How far attention looks back in the layers where it does not see the whole sequence, as configurations call it.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
    """
    config = backbone.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in windows if window is not None]


def on_several_devices(backbone: PreTrainedModel) -> bool:
    """Whether weights of a backbone are on different devices, as a device map puts them."""
    return len({parameter.device for parameter in backbone.parameters()}) > 1


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers in a model that Transformers marks as such."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def decoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The layers of a causal LM that tokens go through, not those of what sees or hears."""
    return layers_of(backbone.get_decoder())


def is_compiled(backbone: PreTrainedModel) -> bool:
    """Whether layers of a backbone are compiled, as `torch_compile` of the trainer does it."""
    return any(layer._compiled_call_impl is not None for layer in layers_of(backbone))
