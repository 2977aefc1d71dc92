"""READ: the prefix before a query. Embeddings, masks, labels, and the arguments of `generate`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checks import capturing
from .output_head import output_head
from .token_losses import IGNORED, PLAIN, target_losses


class Layout(NamedTuple):
    """Where prefix and query tokens go: `[padding; prefix; query]`, the prefix right before the first query token.

    Padding in between would push the memory out of sliding attention windows and, in models without position ids,
    away from the query.
    """

    length: int
    """T, the query's."""
    source: Tensor | None = None
    """[B, P+T], for each place the index into `[prefix; query]` that fills it; None: no padding on the left."""
    query: Tensor | None = None
    """[B, T], for each query token its place."""

    @classmethod
    def of(cls, attention_mask: Tensor, prefix_length: int) -> Layout:
        """Args: attention_mask [B, T], 1 where a query token counts."""
        length = attention_mask.shape[1]
        left = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        if not capturing() and not (left > 0).any():
            return cls(length)
        places = torch.arange(prefix_length + length, device=attention_mask.device).expand(len(attention_mask), -1)
        source = torch.where(
            places < left, places + prefix_length, torch.where(places < left + prefix_length, places - left, places)
        )
        tokens = places[:, :length]
        return cls(length, source, torch.where(tokens < left, tokens, tokens + prefix_length))

    def join(self, prefix: Tensor, query: Tensor) -> Tensor:
        """[B, P, ...] and [B, T, ...] to [B, P+T, ...]."""
        joined = torch.cat([prefix.to(query), query], dim=1)
        if self.source is None:
            return joined
        return joined.gather(1, self.source.view(*self.source.shape, *[1] * (joined.dim() - 2)).expand_as(joined))

    def split(self, joined: Tensor) -> Tensor:
        """The query's part of [B, P+T, V]: [B, T, V]."""
        if self.query is None:
            return joined[:, joined.shape[1] - self.length :]
        return joined.gather(1, self.query[..., None].expand(-1, -1, joined.shape[-1]))


class ReadInputs(NamedTuple):
    """What the backbone gets for `[prefix; query]`."""

    layout: Layout
    inputs_embeds: Tensor
    """[B, P+T, d]."""
    attention_mask: Tensor | None
    """[B, P+T]; None: every place counts."""

    @property
    def position_ids(self) -> Tensor | None:
        """[B, P+T]: counted from 0 at the first place that is not padding. None: as the backbone counts by itself."""
        return None if self.attention_mask is None else (self.attention_mask.long().cumsum(1) - 1).clamp(min=0)


def read_inputs(prefix: Tensor, query_embeddings: Tensor, attention_mask: Tensor | None) -> ReadInputs:
    """Put a prefix [B, P, d] before query embeddings [B, T, d] with their mask [B, T] (None: no padding)."""
    if attention_mask is None:
        layout = Layout(query_embeddings.shape[1])
        return ReadInputs(layout, layout.join(prefix, query_embeddings), None)
    layout = Layout.of(attention_mask, prefix.shape[1])
    ones = attention_mask.new_ones(prefix.shape[:2])
    return ReadInputs(layout, layout.join(prefix, query_embeddings), layout.join(ones, attention_mask))


def targets_only(
    backbone: PreTrainedModel, labels: Tensor | None, most: int, **inputs: Any
) -> tuple[CausalLMOutputWithPast, Tensor]:
    """The backbone's output with the loss of at most `most` labels a row of [B, T], and whether all are first choices.

    Raises:
        ValueError: there are no labels, or more.
    """
    if labels is None:
        raise ValueError("max_targets needs labels.")
    if not capturing() and (found := int((labels != IGNORED).sum(1).max())) > most:
        raise ValueError(f"max_targets is {most}, and a query has {found} labels that count.")
    output = backbone.base_model(**inputs)
    head = backbone.get_output_embeddings()
    once = None if any(parameter.requires_grad for parameter in head.parameters()) else PLAIN
    loss, correct = target_losses(
        output.last_hidden_state, labels, most, output_head(backbone), head.weight.shape[0], once
    )
    return CausalLMOutputWithPast(loss=loss, past_key_values=output.get("past_key_values")), correct


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
