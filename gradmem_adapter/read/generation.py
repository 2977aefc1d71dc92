"""What `generate` must be passed so that it counts and decodes as without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


def generation_option(name: str, kwargs: dict[str, Any], default: GenerationConfig) -> Any:
    """What `generate` uses for an option: the keyword, the configuration passed, the model's own, in this order."""
    for value in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None), getattr(default, name, None)):
        if value is not None:
            return value
    return None


def query_mask(input_ids: Tensor, kwargs: dict[str, Any], default: GenerationConfig) -> Tensor:
    """The mask [B, T] that Transformers' `generate` would infer where none is given."""
    pad, eos = (generation_option(name, kwargs, default) for name in ("pad_token_id", "eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in eos_ids or not (input_ids == pad).any():
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)


def length_arguments(kwargs: dict[str, Any], default: GenerationConfig, embeddings_length: int) -> dict[str, int]:
    """`max_length` and `min_length` as they must be passed so that they count prompt and new tokens, as without memory.

    Transformers subtracts the length of `inputs_embeds` from both, and compares the result with the length of
    `input_ids` all the same.
    """
    pairs = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
    return {
        length: generation_option(length, kwargs, default) + embeddings_length
        for length, new_tokens in pairs.items()
        if generation_option(length, kwargs, default) and generation_option(new_tokens, kwargs, default) is None
    }


_NEED_TOKENS_ALONE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


def check_generation_options(kwargs: dict[str, Any], default: GenerationConfig) -> None:
    """Raise for ways of decoding with which Transformers loses `inputs_embeds`, and with them the memory.

    Assisted decoding and chunked prefill count the cache in `input_ids`, which are shorter than what is in it by the
    prefix; the text they give is not the model's.

    Raises:
        NotImplementedError: one of them is asked for.
    """
    for name in _NEED_TOKENS_ALONE:
        if generation_option(name, kwargs, default) is not None:
            raise NotImplementedError(
                f"generate(memory=...) cannot be combined with {name}: Transformers supports it for prompts of tokens "
                "alone, and memory is input embeddings. Leave it out."
            )
