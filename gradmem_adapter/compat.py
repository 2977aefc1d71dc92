"""Checkpoints of the authors' implementation of GradMem, opened as an adapter on a backbone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.utils.parameters import backbone_parameters

_BACKBONE = "model."
# The authors' name of each tensor of the method, and ours.
_NAMES = {
    "mem": "gradmem_memory",
    "mem_proj": "gradmem_projection",
    "write_head": "gradmem_write_head",
    "write_st": "gradmem_write_start",
    "write_end": "gradmem_write_end",
    "read_st": "gradmem_read_start",
    "read_end": "gradmem_read_end",
}
_META_GRADIENTS = {"second": "exact", "first": "first_order", "none": "none"}
_OPTIONS = {
    "n_mem_tokens",
    "K",
    "lr",
    "grad_mode",
    "use_write_head",
    "use_mem_proj",
    "mem_proj_mode",
    "n_ctrl_tokens",
    "inner_clip_norm",
    "last_K_second_order",
    "add_inner_loss_to_outer",
    "inner_loss_weight",
}
_REQUIRED = {"n_mem_tokens", "K", "lr"}
_DESCRIPTIONS = {"architecture", "base_config", "tied_embeddings"}  # other fields that a config file may have


def config_from_authors_options(options: Mapping[str, Any]) -> GradMemConfig:
    """The `GradMemConfig` that corresponds to the authors' options, with all weights trained.

    Args:
        options (`Mapping`): the GradMem options under the authors' names (`n_mem_tokens`, `K`, `lr`, `grad_mode`, ...).

    Raises:
        ValueError: an option is unknown, missing or has a wrong value.
    """
    unknown = set(options) - _OPTIONS - _DESCRIPTIONS
    if unknown:
        raise ValueError(f"Unknown options {sorted(unknown)}. Known options are {sorted(_OPTIONS)}.")
    if missing := _REQUIRED - set(options):
        raise ValueError(f"The options {sorted(missing)} are missing. Pass all of {sorted(_REQUIRED)}.")
    grad_mode = options.get("grad_mode", "second")
    if grad_mode not in _META_GRADIENTS:
        raise ValueError(f"grad_mode must be one of {sorted(_META_GRADIENTS)}, got {grad_mode!r}.")
    mode = options.get("mem_proj_mode")
    projection = options.get("use_mem_proj", mode is not None)
    if projection and mode not in (None, "proj"):
        raise ValueError(f"mem_proj_mode must be 'proj' (one shared linear layer), got {mode!r}.")
    return GradMemConfig(
        num_memory_tokens=options["n_mem_tokens"],
        write_steps=options["K"],
        write_lr=options["lr"],
        meta_gradient=_META_GRADIENTS[grad_mode],
        second_order_steps=options.get("last_K_second_order"),
        write_clip_norm=options.get("inner_clip_norm"),
        memory_projection="shared" if projection else "none",
        write_head=options.get("use_write_head", False),
        num_control_tokens=options.get("n_ctrl_tokens") or 0,
        reconstruction_weight=(
            options.get("inner_loss_weight", 1.0) if options.get("add_inner_loss_to_outer", False) else 0.0
        ),
        train_backbone=True,
    )


def load_authors_checkpoint(
    state_dict: Mapping[str, Tensor],
    base_config: PretrainedConfig | Mapping[str, Any],
    options: Mapping[str, Any],
) -> PeftModel:
    """Open a checkpoint of the authors' code. As in theirs, the slots and all weights are trainable.

    Args:
        state_dict (`Mapping[str, Tensor]`): tensors under the authors' names: `mem`, `mem_proj.*`, `write_head.weight`,
            `write_st`, `write_end`, `read_st`, `read_end`, and the backbone under `model.`.
        base_config (`PretrainedConfig` or `Mapping`): the backbone's Transformers config, or its dict with
            `model_type`.
        options (`Mapping`): the GradMem options under the authors' names (`n_mem_tokens`, `K`, `lr`, `grad_mode`, ...).

    Returns:
        The backbone with a GradMem adapter, in the checkpoint's dtype and in eval mode.

    Raises:
        ValueError: an option is unknown, or tensors are missing, left over or of another shape.
    """
    config = config_from_authors_options(options)
    if not isinstance(base_config, PretrainedConfig):
        fields = dict(base_config)
        base_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    base_config = copy.deepcopy(base_config)  # Transformers sets the dtype in it
    dtype = state_dict["mem"].dtype if "mem" in state_dict else torch.float32
    backbone = AutoModelForCausalLM.from_config(base_config, dtype=dtype)
    model = get_peft_model(backbone, config, autocast_adapter_dtype=False)

    ours: dict[str, nn.Parameter] = authors_names(model)
    tied = {name: tensor for name, tensor in _backbone_names(model).items() if name not in ours}
    missing, extra = set(ours) - set(state_dict), set(state_dict) - set(ours) - set(tied)
    if missing or extra:
        raise ValueError(
            f"The checkpoint does not match options and base_config: missing {sorted(missing)}, unexpected "
            f"{sorted(extra)}."
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            if parameter.shape != state_dict[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(state_dict[name].shape)} in the checkpoint, but options and base_config "
                    f"need {tuple(parameter.shape)}."
                )
            parameter.copy_(state_dict[name])
        for name in set(tied) & set(state_dict):
            if not torch.equal(tied[name], state_dict[name].to(tied[name])):
                raise ValueError(
                    f"{name} differs from the weights that base_config ties it to. Set tie_word_embeddings=False in "
                    "base_config."
                )
    return model.eval()


def authors_names(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of the active adapter and the backbone, under the names of the authors' code.

    Tied weights appear once, under the first of their names. A LoRA, a learned write learning rate and a start from the
    context do not exist there.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.

    Raises:
        ValueError: the adapter has a part without a name in the authors' code.
    """
    tuner = cast(GradMemModel, model.base_model)
    slots, adapter = tuner.slots, model.active_adapter
    config = cast(GradMemConfig, model.peft_config[adapter])
    if config.lora_config is not None or config.learn_write_lr != "no" or config.start != "slots":
        raise ValueError(
            "lora_config, learn_write_lr and start have no counterpart in the authors' code. Use an adapter without "
            "them."
        )
    result: dict[str, nn.Parameter] = {}
    for theirs, name in _NAMES.items():
        container = getattr(slots, name)
        if adapter not in container:
            continue
        if isinstance(container, nn.ParameterDict):
            result[theirs] = container[adapter]
        else:
            result |= {f"{theirs}.{part}": parameter for part, parameter in container[adapter].named_parameters()}
    return result | {_BACKBONE + name: parameter for name, parameter in backbone_parameters(tuner.model)}


def _backbone_names(model: PeftModel) -> dict[str, Tensor]:
    """Every backbone tensor under the authors' name; tied weights appear under each of their names."""
    return {_BACKBONE + name: tensor for name, tensor in model.get_base_model().state_dict().items()}
