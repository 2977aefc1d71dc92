"""Build, save and load the models of runs, both GradMem and baselines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.backbones import check_end_token, load_backbone
from gradmem_adapter.training.weights import read_trained_weights
from gradmem_adapter.utils.adapter_file import check_tensors
from gradmem_adapter.utils.fields import from_json
from gradmem_adapter.utils.files import read_text, replacing

from .config import RunConfig

RECIPE = "recipe.json"
"""The file beside a checkpoint's weights with the configuration of its run."""


def scratch_llama(
    tokenizer: PreTrainedTokenizerBase, *, layers: int = 4, width: int = 128, heads: int = 4, positions: int = 1024
) -> PreTrainedModel:
    """A Llama with random weights (standard deviation 0.02), by default of the size the paper uses for retrieval.

    The output embeddings start as a copy of the input embeddings and are trained separately.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with pad and end tokens.
        layers, width, heads, positions (`int`, *optional*): the shape; the gated MLP is four times as wide.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def build_model(config: RunConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model before training, and its tokenizer.

    Raises:
        ValueError: the tokenizer's end token is not one that the backbone stops at.
    """
    torch.manual_seed(config.training.get("seed", 0))
    memory = dict(config.memory)
    if isinstance(config.backbone, str):
        backbone, tokenizer = load_backbone(config.backbone)
        check_end_token(backbone, tokenizer)
        torch.manual_seed(config.training.get("seed", 0))
    else:
        tokenizer = config.tasks[0].tokenizer()
        backbone, memory = scratch_llama(tokenizer, **config.backbone), {"train_backbone": True} | memory
    model = config.method.build(backbone, memory)
    if config.init_from is not None:
        path = Path(config.init_from)
        if load_config(path).method.name == config.method.name:
            config.method.load_weights(model, path)
        else:
            _take_lora(model, path)
    return model, tokenizer


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run."""
    return load_backbone(config.backbone)[1] if isinstance(config.backbone, str) else config.tasks[0].tokenizer()


@torch.no_grad()
def _take_lora(model: nn.Module, path: Path) -> None:
    """Load the LoRA of a baseline's checkpoint into a model.

    Raises:
        FileNotFoundError, ValueError: the checkpoint has no LoRA, or a different one.
    """
    own = {name: weight.data for name, weight in language_model(model).named_parameters() if ".lora_" in name}
    saved = {name.removeprefix("backbone."): weight for name, weight in read_trained_weights(path).items()}
    found = {name: weight for name, weight in saved.items() if ".lora_" in name}
    check_tensors(path, found, own)
    for name, weight in own.items():
        weight.copy_(found[name])


def load_teacher(config: RunConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """The causal LM of a run's teacher, with its LoRA merged into the weights; None if the run has no teacher.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the teacher was trained by another method than `full_context`.
    """
    if config.teacher is None:
        return None
    model, _, made = load_model(Path(config.teacher))
    if made.method.name != "full_context":
        raise ValueError(f"The teacher must be of method full_context, but {config.teacher} is of {made.method.name}.")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    teacher = language_model(model)
    teacher.to(dtype)  # type: ignore[arg-type]
    return teacher


def language_model(model: nn.Module) -> PreTrainedModel:
    """The causal LM in a model."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: RunConfig, path: Path) -> None:
    """Save a trained model and its configuration."""
    config.method.save(model, tokenizer, path)
    _write_config(config, path)


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, PreTrainedTokenizerBase, RunConfig]:
    """A model that `save_model` saved, its tokenizer and its configuration; for a recipe, the untrained model.

    Raises:
        FileNotFoundError: there is no such model.
    """
    config = load_config(path)
    if path.is_file():
        model, tokenizer = build_model(config)
        return model.to(device).eval(), tokenizer, config
    start = dataclasses.replace(config, init_from=None, teacher=None)
    return *config.method.load(path, device, lambda: build_model(start)), config


def load_config(path: Path) -> RunConfig:
    """The configuration of a trained model, or of a recipe.

    Raises:
        FileNotFoundError: there is no configuration.
    """
    return RunConfig.load(path) if path.is_file() else RunConfig.of(_fields(path))


def _write_config(config: RunConfig, path: Path) -> None:
    with replacing(path / RECIPE) as temporary:
        temporary.write_text(json.dumps(config.fields(), indent=1), encoding="utf-8")


def _fields(path: Path) -> dict[str, Any]:
    if not (path / RECIPE).is_file():
        raise FileNotFoundError(
            f"There is no model trained by a recipe in {str(path)!r}: it has no {RECIPE}. Pass the directory of a run "
            "of `python -m evaluation train`; `gradmem train` measures its adapters with its own option --eval."
        )
    fields = from_json(read_text(path / RECIPE), str(path / RECIPE))
    if not isinstance(fields, dict):
        raise ValueError(f"{path / RECIPE} must be a mapping of fields, got {type(fields).__name__}.")
    return fields
