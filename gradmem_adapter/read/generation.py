"""READ as decoding: Transformers' `generate` after a prefix, with arguments that make it count and decode as without
memory."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gradmem_adapter.ops.padding import move_padding_left
from gradmem_adapter.read.left_padding import check_left_padding
from gradmem_adapter.read.prefix import read_inputs
from gradmem_adapter.read.prefix_cache import KeptPrefix
from gradmem_adapter.read.static_decoding import can_capture, generate_statically
from gradmem_adapter.utils.backbone import (
    check_length,
    device_of,
    first_position,
    fresh,
    max_positions,
    turns_by_length,
    uses_checkpointing,
)
from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.tokens import check_token_options, check_tokens
from gradmem_adapter.utils.wording import counted

_NEED_TOKENS_ALONE = (
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size", "token_healing",
)  # fmt: skip
"""With these options Transformers loses `inputs_embeds`, and so the memory, or changes the tokens that they stand
for."""

_NEED_ANOTHER_CACHE = (
    "past_key_values", "compile_config", "custom_generate", "position_ids", "output_attentions", "output_hidden_states",
)  # fmt: skip
"""With these options Transformers uses a cache of its own, or returns something for every position of the prefix."""


def check_prompt(backbone: PreTrainedModel, input_ids: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Check prompts, and return their token ids `[B, T]` on the backbone's device.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        input_ids (`Tensor`): `[B, T]`.
        options (`dict`): the other arguments for Transformers' `generate`.

    Raises:
        TypeError, ValueError: there is no prompt, or a token id is not in the model's vocabulary.
        NotImplementedError: a way of decoding that Transformers supports only for prompts of token ids.
    """
    if options.get("inputs_embeds") is not None:
        raise ValueError("Pass the prompt as input_ids: inputs_embeds cannot be combined with memory.")
    if input_ids is None:
        raise ValueError("generate(memory=...) needs a prompt. Pass input_ids of shape [batch, length].")
    check_tokens("input_ids", input_ids, options.get("attention_mask"), backbone)
    check_token_options(options, input_ids.shape)
    check_generation_options(options, backbone.generation_config)
    return input_ids.to(device_of(backbone))


def generate_with_memory(
    backbone: PreTrainedModel, input_ids: Tensor, prefix: Tensor, kept: KeptPrefix | None = None, **options: Any
) -> Any:
    """Transformers' `generate` on `[prefix; prompt]`.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        input_ids (`Tensor`): `[B, T]`, as `check_prompt` returns them.
        prefix (`Tensor`): `[B, P, d]`, placed before each prompt.
        kept (`KeptPrefix`, *optional*): keeps the keys and values of the prefix for the next call.
        options: further arguments of Transformers' `generate`.

    Returns:
        What Transformers returns: prompts and new tokens `[B, T + new]`.
    """
    default = backbone.generation_config
    if uses_checkpointing(backbone):
        raise ValueError(
            "In training mode with gradient checkpointing, layers ignore the cache but Transformers' generate relies "
            "on it, so its tokens would be wrong. Call model.eval() first."
        )
    attention_mask = options.pop("attention_mask", None)
    if attention_mask is None:
        attention_mask = query_mask(input_ids, options, default)
    attention_mask = attention_mask.to(input_ids.device)
    if not capturing() and input_ids.numel() and not attention_mask[:, -1].all():
        input_ids, attention_mask = _padding_on_the_left(input_ids, attention_mask, options)
    check_length(prefix.shape[1], input_ids, attention_mask, backbone)
    first = first_position(backbone)
    with torch.no_grad():
        query = backbone.get_input_embeddings()(input_ids)
        read = read_inputs(prefix, query, attention_mask, first)
    check_left_padding(backbone, read.layout.source is not None)
    end_with_positions(backbone, prefix.shape[1], attention_mask, options)
    options |= length_arguments(options, default, read.inputs_embeds.shape[1])
    inputs = {"inputs_embeds": read.inputs_embeds, "attention_mask": read.attention_mask}
    padded_left = read.layout.source is not None
    names_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    if first or (padded_left and not names_positions):  # Transformers counts from 0, if they are named at all
        inputs["position_ids"] = read.position_ids
    backbone = taking_embeddings(fresh(backbone), input_ids.shape[1])
    kind = own_cache(backbone, options)
    if padded_left or first or not input_ids.numel() or turns_by_length(backbone):
        kept = None
    if kind == "static":
        output = generate_statically(backbone, input_ids, prefix.shape[1], kept, **inputs, **options)
    elif kept is None or kind is None:
        output = backbone.generate(input_ids, **inputs, **options)  # type: ignore[operator]
    else:
        cache = kept.start(backbone, prefix.shape[1])
        options["past_key_values"] = cache
        output = backbone.generate(input_ids, **inputs, **options)  # type: ignore[operator]
        kept.keep(cache)
    if not isinstance(output, Tensor):
        for name in output.keys() & {"hidden_states", "attentions"}:
            steps = [read.layout.split_outputs({name: step}, new)[name] for new, step in enumerate(output[name])]
            output[name] = tuple(steps)
    return output


def taking_embeddings(backbone: PreTrainedModel, prompt_length: int) -> PreTrainedModel:
    """A backbone whose `generate` takes `inputs_embeds`.

    Transformers checks whether `prepare_inputs_for_generation` names them. Some classes (Bamba, Falcon-H1, Zamba, ...)
    pass them on without naming them. For these, a copy of the top module names them; the model is not changed.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        prompt_length (`int`): T, the number of token ids in the prompt.
    """
    signature = inspect.signature(cast(Any, backbone).prepare_inputs_for_generation)
    if "inputs_embeds" in signature.parameters:
        return backbone
    named = copy.copy(backbone)
    prepare = cast(Any, named).prepare_inputs_for_generation

    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        ids, given = inputs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None and inputs.get("inputs_embeds") is not None:  # GPT-1, which has no cache
            new = backbone.get_input_embeddings()(ids[:, prompt_length:])
            inputs |= {"input_ids": None, "inputs_embeds": torch.cat([inputs["inputs_embeds"], new], dim=1)}
        elif given is not None and kwargs.get("is_first_iteration") and inputs.get("inputs_embeds") is None:
            raise NotImplementedError(
                f"generate(memory=...) does not work with {type(backbone).__name__}, whose "
                "prepare_inputs_for_generation drops inputs_embeds and so the memory. Use another backbone."
            )
        return inputs

    *before, rest = signature.parameters.values()
    embeddings = inspect.Parameter("inputs_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    named.__dict__["prepare_inputs_for_generation"] = prepare_inputs_for_generation
    prepare_inputs_for_generation.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*before, embeddings, rest]
    )
    return named


def _padding_on_the_left(input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Move the padding of prompts to the left (many tokenizers pad on the right), so that new tokens follow the last
    token."""
    if options.get("past_key_values") is not None:
        raise ValueError(
            "Prompts that continue past_key_values cannot be padded on the right: new tokens would follow the padding. "
            "Pad them on the left, like their cache."
        )
    return move_padding_left(input_ids, attention_mask)


def generation_option(name: str, options: dict[str, Any], default: GenerationConfig) -> Any:
    """The value of an option in `generate`: from the keyword, the passed configuration or the model's own, in this
    order."""
    passed = options.get("generation_config")
    for value in (options.get(name), getattr(passed, name, None), getattr(default, name, None)):
        if value is not None:
            return value
    return None


def query_mask(input_ids: Tensor, options: dict[str, Any], default: GenerationConfig) -> Tensor:
    """The mask `[B, T]` that Transformers' `generate` would infer if none is given."""
    pad, eos = (generation_option(name, options, default) for name in ("pad_token_id", "eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in eos_ids or not (input_ids == pad).any():
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)


def end_with_positions(
    backbone: PreTrainedModel, prefix_length: int, attention_mask: Tensor, options: dict[str, Any]
) -> None:
    """Limit `max_new_tokens` in `options` to the backbone's remaining positions, with a warning."""
    default, positions, prompt = backbone.generation_config, max_positions(backbone), attention_mask.shape[1]
    for name in ("max_new_tokens", "max_length"):
        check_kind(name, generation_option(name, options, default), SupportsIndex | float | None, "a number of tokens")
    wanted = generation_option("max_new_tokens", options, default)
    if wanted is None:
        wanted = (generation_option("max_length", options, default) or prompt) - prompt
    if positions is None or capturing() or prefix_length + prompt + wanted - 1 <= positions:
        return
    room = positions + 1 - prefix_length - int(attention_mask.sum(1).max())  # the last new token is not read
    if wanted > room:
        warnings.warn(
            f"The answer will end after {counted(room, 'token')} instead of {wanted:,}: the model has {positions:,} "
            "positions, and memory and prompt take the rest.",
            stacklevel=4,
        )
        options.pop("max_length", None)
        options["max_new_tokens"] = room


def length_arguments(options: dict[str, Any], default: GenerationConfig, embeddings_length: int) -> dict[str, int]:
    """Values of `max_length` and `min_length` with which they count prompt and new tokens, as without memory.

    Transformers subtracts the length of `inputs_embeds` from both, but then compares them with the length of
    `input_ids`.
    """
    pairs = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
    return {
        length: generation_option(length, options, default) + embeddings_length
        for length, new_tokens in pairs.items()
        if generation_option(length, options, default) and generation_option(new_tokens, options, default) is None
    }


def check_generation_options(options: dict[str, Any], default: GenerationConfig) -> None:
    """Raise for ways of decoding in which Transformers loses `inputs_embeds`, and so the memory.

    Assisted decoding and chunked prefill measure the cache by `input_ids`, which lack the prefix, so their text would
    be wrong. Continuous batching ("paged") gets only `input_ids`.

    Raises:
        NotImplementedError: one of them is requested.
        ValueError: the cache should be offloaded from an accelerator, but there is none.
    """
    kind = generation_option("cache_implementation", options, default)
    if "offloaded" in str(kind) and not torch.accelerator.is_available():
        raise ValueError(
            f"cache_implementation={kind!r} moves layers of the cache between an accelerator and the CPU, but this "
            "machine has no accelerator. Leave it out, or pass 'static'."
        )
    asked = [name for name in _NEED_TOKENS_ALONE if generation_option(name, options, default) not in (None, False)]
    if kind == "paged":
        asked.append("cache_implementation='paged'")
    if asked:
        raise NotImplementedError(
            f"generate(memory=...) cannot be combined with {', '.join(asked)}: Transformers supports this only for "
            "prompts of token ids, but memory consists of input embeddings. Leave it out."
        )


def own_cache(backbone: PreTrainedModel, options: dict[str, Any]) -> str | None:
    """The kind of KV cache to create here, "dynamic" or "static", which can start from a prefix's keys and values.
    None: Transformers creates another one, or none."""
    if backbone.training or capturing() or not cast(Any, backbone)._supports_default_dynamic_cache():
        return None
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:  # GPT-1 has no cache
        return None
    default = backbone.generation_config
    chosen = [generation_option(name, options, default) for name in _NEED_ANOTHER_CACHE]
    if any(option is not None and option is not False for option in chosen):
        return None
    if generation_option("use_cache", options, default) is False:
        return None
    kind = generation_option("cache_implementation", options, default)
    if kind == "static":
        return kind if can_capture(backbone) else None
    layers = DynamicCache(config=backbone.config).layers
    grows = kind is None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return "dynamic" if grows else None
