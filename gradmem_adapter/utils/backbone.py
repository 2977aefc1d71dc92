"""What a backbone must be so that GradMem can be attached to it, and what is asked of it."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


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
            "which PEFT would mix up with this one. Merge it into the weights first: "
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
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise TypeError(
            f"{type(model).__name__} attends in both directions (config.is_decoder is not set), so a write loss would "
            "see the tokens it predicts; GradMem needs a causal language model."
        )


def _adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that a model carries."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def max_positions(backbone: PreTrainedModel) -> int | None:
    """How many positions a backbone has, `None` where it does not say."""
    return getattr(backbone.config.get_text_config(), "max_position_embeddings", None)


def uses_checkpointing(backbone: PreTrainedModel) -> bool:
    """Whether the backbone's layers are computed again in backward passes (gradient checkpointing)."""
    return backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
