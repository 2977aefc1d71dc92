"""Errors for models and tokens that cannot work: what was wrong, what was expected, what to do."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from gradmem_adapter.utils.capture import capturing


def check_backbone(model: object) -> None:
    """Raise `TypeError` unless `model` is a causal language model of Transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"GradMem attaches to a causal language model of Transformers, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
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
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise TypeError(
            f"{type(model).__name__} attends in both directions (config.is_decoder is not set), so a write loss would "
            "see the tokens it predicts; GradMem needs a causal language model."
        )


def check_end_token(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if `generate` would not stop at the token that training ends a target with."""
    config = backbone.generation_config
    ends = config.eos_token_id if config is not None else None
    stops = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        raise ValueError(
            f"The tokenizer's end token is {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), and the backbone's "
            f"generation stops at {ends}: answers would be trained to end where generation goes on. Set "
            "tokenizer.eos_token or backbone.generation_config.eos_token_id, and save both anew."
        )


def checkpointing(backbone: PreTrainedModel) -> bool:
    """Whether the backbone's layers are computed again in backward passes (gradient checkpointing)."""
    return backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())


def check_tokens(name: str, input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> None:
    """Raise unless `input_ids` [B, N] are token ids of the model and the mask fits."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"{name} must be a tensor of token ids [batch, length], got {type(input_ids).__name__}.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer token ids, got {input_ids.dtype}.")
    if input_ids.dim() != 2:
        raise ValueError(f"{name} must have shape [batch, length], got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{name} {tuple(input_ids.shape)} and its attention mask {tuple(attention_mask.shape)} have different "
            "shapes; pass both as the tokenizer returned them."
        )
    if not capturing() and input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= vocabulary):
        raise ValueError(
            f"{name} holds token ids from {int(input_ids.min())} to {int(input_ids.max())}; the model knows 0 to "
            f"{vocabulary - 1}. Is the tokenizer the model's own?"
        )
