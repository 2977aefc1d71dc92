"""What a backbone must be so that GradMem can be attached to it, and what is asked of it."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check_backbone(model: object) -> None:
    """Raise `TypeError` unless a model is a causal language model of Transformers.

    Args:
        model (`object`): what an adapter is to be attached to.
    """
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


def max_positions(backbone: PreTrainedModel) -> int | None:
    """How many positions a backbone has, `None` where it does not say."""
    return getattr(backbone.config.get_text_config(), "max_position_embeddings", None)


def uses_checkpointing(backbone: PreTrainedModel) -> bool:
    """Whether the backbone's layers are computed again in backward passes (gradient checkpointing)."""
    return backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
