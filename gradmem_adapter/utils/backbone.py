"""Checks that GradMem can be attached to a backbone, and questions about its structure."""

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
    """Raise unless a model is a Transformers causal language model without an adapter.

    Raises:
        TypeError: it is not a causal language model.
        ValueError: it has an adapter, or layers on a disk that nothing loads any more.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"GradMem needs a causal language model of Transformers, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} already has an adapter ({', '.join(_adapters(model)) or 'of unknown name'}), "
            "which PEFT would mix up with this one. To discard it, load the backbone again, or use the model that "
            "model.unload() returns. To keep it, merge it into the weights: PeftModel.from_pretrained(backbone, "
            "adapter).merge_and_unload(). To train a LoRA with the memory, use GradMemConfig(lora_config=...); to add "
            "another GradMem adapter, use model.add_adapter(name, config)."
        )
    places = (getattr(model, "hf_device_map", None) or {}).values()
    if "disk" in places and not any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has layers on the disk, but the hooks that load them were removed. "
            "PeftModel.from_pretrained removes them, and may then write the adapter into the backbone's own files. "
            "Load the backbone again, and open the adapter with load_checkpoint(path, backbone=backbone)."
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder model; GradMem needs a decoder-only causal language model."
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise TypeError(
            f"{type(model).__name__} has no language-model head; load the checkpoint with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if not all(hasattr(table, "weight") for table in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise TypeError(
            f"{type(model).__name__} has several tables of embeddings per token, as models of audio codebooks do; "
            "GradMem needs a causal language model with one."
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise TypeError(
            f"{type(model).__name__} attends in both directions (config.is_decoder is not set), so the write loss "
            "would see the tokens that it predicts; GradMem needs a causal language model."
        )
    trunk_name(model)


def _adapters(model: nn.Module) -> list[str]:
    """The names of the adapters in a model."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def trunk_name(backbone: PreTrainedModel) -> str:
    """The name of the child that maps input embeddings to last hidden states, which the output head reads.

    Usually `base_model_prefix`, but some classes name a child that they do not have, or one of a larger model.

    Raises:
        TypeError: there is no such child.
    """
    if isinstance(backbone._modules.get(backbone.base_model_prefix), nn.Module):
        return backbone.base_model_prefix
    embeddings = backbone.get_input_embeddings()
    for name, child in backbone._modules.items():
        if child is not None and child is not embeddings and contains(child, embeddings):
            return name
    raise TypeError(
        f"{type(backbone).__name__} has no submodule between input embeddings and output head, which WRITE needs to "
        "get the last hidden states."
    )


def trunk(backbone: PreTrainedModel) -> nn.Module:
    """The child that maps input embeddings to last hidden states."""
    return cast(nn.Module, backbone._modules[trunk_name(backbone)])


def fresh(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without the state that an earlier call left in it; that state stays in the original.

    Models such as Qwen2-VL keep the offset of positions after images (`rope_deltas`) and add it to the positions of any
    later input embeddings. For them, the top two modules are copied, and all others shared.

    Args:
        backbone (`PreTrainedModel`): not changed.
    """
    inner = trunk(backbone)
    if "rope_deltas" not in inner.__dict__:
        return backbone
    top, copied = shallow_copy(backbone), shallow_copy(inner)
    copied.__dict__["rope_deltas"] = None
    top._modules[trunk_name(backbone)] = copied
    return cast(PreTrainedModel, top)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with the same children, parameters and buffers. Hooks of accelerate act on the copy.

    Args:
        module (`nn.Module`): not changed.
    """
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    for name, value in module.__dict__.items():  # offloading replaces forward by a function bound to the module
        if isinstance(value, MethodType) and value.__self__ is module:
            copied.__dict__[name] = MethodType(value.__func__, copied)
        elif isinstance(value, partial) and value.args[:1] == (module,):
            copied.__dict__[name] = rebound = partial(value.func, copied, *value.args[1:], **value.keywords)
            rebound.__dict__.update(value.__dict__)
    return copied


def with_replaced(module: Module, replaced: Callable[[nn.Module], nn.Module | None]) -> Module:
    """A model with some modules replaced. Only modules that contain a replaced one are copied, so other threads see no
    change.

    Args:
        module (`nn.Module`): the model, or a part of it; not changed.
        replaced (`Callable`): returns the replacement of a module, or None to keep it.
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
    """The device for a backbone's token ids: that of its embeddings, or where accelerate moves them when they are
    used."""
    embeddings = backbone.get_input_embeddings()
    if has_offloaded_params(embeddings):
        return torch.device(cast(Any, embeddings)._hf_hook.execution_device)
    return cast(Tensor, embeddings.weight).device


def check_start(backbone: PreTrainedModel, start: str) -> None:
    """Raise `ValueError` unless the last hidden states are as wide as the input embeddings, so that a memory can start
    from both. Runs two tokens through the trunk to find out."""
    embeddings = backbone.get_input_embeddings()
    device = device_of(backbone)
    if device.type == "meta":
        return
    with device, torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        tokens = embeddings(torch.zeros(1, 2, dtype=torch.long, device=device))
        hidden = trunk(fresh(backbone))(inputs_embeds=tokens, use_cache=False, return_dict=True).last_hidden_state
    if hidden.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"start={start!r} adds last hidden states to memory slots, but in {type(backbone).__name__} they have "
            f"width {hidden.shape[-1]} and input embeddings have width {tokens.shape[-1]}. Use start='slots'."
        )


def contains(module: nn.Module, part: nn.Module) -> bool:
    """Whether a module is `part` or contains it."""
    return any(found is part for found in module.modules())


_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""The names of the number of positions in configurations: in most, in MPT's, in Whisper's."""


def max_positions(backbone: PreTrainedModel) -> int | None:
    """How many positions a backbone has for tokens; `None` if it is unknown or unlimited."""
    config = backbone.config.get_text_config()
    positions = next((getattr(config, name) for name in _POSITIONS if hasattr(config, name)), None)
    return positions - first_position(backbone) if isinstance(positions, int) and positions > 0 else None


def turns_by_length(backbone: PreTrainedModel) -> bool:
    """Whether RoPE rotates the keys of all tokens differently in a longer sequence: Phi-3's longrope changes its angles
    beyond a certain length."""
    rope = getattr(backbone.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # for all layers, or per layer type
    return any(kind.get("rope_type") == "longrope" for kind in kinds)


_first_positions: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
"""A cache, because every WRITE and READ needs the value, and finding it walks over all modules."""


def first_position(backbone: PreTrainedModel) -> int:
    """The position of the first token: 0, or the one after the padding position in models that have one (such as
    RoBERTa)."""
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
    """Raise `ValueError` if a prefix and the query after it are longer than the backbone's positions.

    Args:
        prefix_length (`int`): P.
        query (`Tensor`): `[B, T, ...]`.
        attention_mask (`Tensor`, *optional*): `[B, T]`, 1 where a query token counts.
        backbone (`PreTrainedModel`): the causal LM.
        name (`str`, *optional*, defaults to `"A query"`): what is read, for the error message.
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
    """Whether the backbone's layers are recomputed in backward passes (gradient checkpointing)."""
    return backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())


def attention_windows(backbone: PreTrainedModel) -> list[int]:
    """The attention windows of the layers that do not attend to the whole sequence, from the configuration."""
    config = backbone.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in windows if window is not None]


def on_several_devices(backbone: PreTrainedModel) -> bool:
    """Whether a backbone's weights are on several devices, as with a device map."""
    return len({parameter.device for parameter in backbone.parameters()}) > 1


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, as marked by Transformers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def decoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The layers of a causal LM's text decoder, without those of vision or audio encoders."""
    return layers_of(backbone.get_decoder())


def is_compiled(backbone: PreTrainedModel) -> bool:
    """Whether layers of a backbone are compiled, as the trainer's `torch_compile` does."""
    return any(layer._compiled_call_impl is not None for layer in layers_of(backbone))
