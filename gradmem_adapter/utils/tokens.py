"""Checks of token ids and texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.kinds import check_kind


def as_long(ids: Any) -> Any:
    """Convert token ids, labels or indices to int64, as embeddings, losses and indexing need; other values are returned
    unchanged."""
    whole = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids.long() if whole else ids


def check_tokens(name: str, input_ids: Tensor, attention_mask: Tensor | None, backbone: PreTrainedModel) -> None:
    """Raise unless token ids are in the model's vocabulary and the mask has their shape.

    Args:
        name (`str`): the caller's name for the ids, for messages.
        input_ids (`Tensor`): integers `[B, N]`.
        attention_mask (`Tensor`, *optional*): `[B, N]`.
        backbone (`PreTrainedModel`): the model, whose embeddings define the valid ids.

    Raises:
        TypeError: `input_ids` is not a tensor of integers.
        ValueError: a shape is wrong, or an id is out of range.
    """
    check_kind(name, input_ids, Tensor, "a tensor of token ids [batch, length]")
    check_kind(f"The attention mask of {name}", attention_mask, Tensor | None, "a tensor")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer token ids, got {input_ids.dtype}.")
    if input_ids.dim() != 2:
        raise ValueError(f"{name} must have shape [batch, length], got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{name} {tuple(input_ids.shape)} and its attention mask {tuple(attention_mask.shape)} have different "
            "shapes; pass both as returned by the tokenizer."
        )
    vocabulary = cast(Tensor, backbone.get_input_embeddings().weight).shape[0]
    if not capturing() and input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= vocabulary):
        raise ValueError(
            f"{name} holds token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model knows 0 to "
            f"{vocabulary - 1}. Use the model's own tokenizer. If tokens were added to it, call "
            "model.resize_token_embeddings(len(tokenizer)) before an adapter is attached."
        )


def check_pad_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raise `ValueError` if batches cannot be padded: the tokenizer has no token for it, or the model does not know it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): pads with its pad token, or with its eos token if it has none.
        model (`nn.Module`): the causal LM, with an adapter or without.
    """
    name, pad = ("eos", tokenizer.eos_token_id) if tokenizer.pad_token_id is None else ("pad", tokenizer.pad_token_id)
    if pad is None:
        raise ValueError("The tokenizer has neither a pad nor an eos token; set tokenizer.pad_token.")
    rows = cast(Any, model).get_input_embeddings().weight.shape[0]
    if pad >= rows:
        raise ValueError(
            f"The tokenizer's {name} token has id {pad}, but the model knows 0 to {rows - 1}: the token was added to "
            "the tokenizer only. Set tokenizer.pad_token to a token of the model, such as tokenizer.eos_token, or call "
            "model.resize_token_embeddings(len(tokenizer)) before an adapter is attached."
        )


_OF_ITS_OWN = ("attention_mask", "logits_to_keep", "negative_prompt_ids", "negative_prompt_attention_mask")
"""Arguments that work with memory, or belong to another prompt."""


def check_token_types(token_type_ids: Tensor | None) -> None:
    """Raise `ValueError` for token types other than 0, because memory vectors have no token type.

    Args:
        token_type_ids (`Tensor`, *optional*): `[B, N]`, as tokenizers return them: zeros for single texts.
    """
    if token_type_ids is not None and not capturing() and token_type_ids.any():
        raise ValueError(
            "token_type_ids other than 0 cannot be combined with memory, which has no token types. Write and read "
            "single texts, not pairs."
        )


def check_token_options(options: dict[str, Any], shape: torch.Size) -> None:
    """Raise `ValueError` for arguments with an entry for each token of a query: the memory before it has no entries.

    Args:
        options (`dict[str, Any]`): further arguments for the backbone. Token types of 0 are removed, so that
            `**tokenizer(...)` can be passed.
        shape (`torch.Size`): the query's shape, `[B, T]`.
    """
    check_token_types(options.pop("token_type_ids", None))
    for name, value in options.items():
        if name == "position_ids" and value is not None:
            raise ValueError(
                "position_ids cannot be combined with memory, because they are computed from the prefix and the mask. "
                "Leave them out."
            )
        if isinstance(value, Tensor) and value.shape[:2] == shape and name not in _OF_ITS_OWN:
            raise ValueError(
                f"{name} has an entry for each token of the query, but none for the memory before it. Leave it out, or "
                "pass prefix_embeddings(state) to the backbone yourself."
            )


_FIRST_PIECE = 16
"""The characters to tokenise first for each allowed token: few texts have this many per token."""


def check_fits(name: str, text: str, tokenizer: Any, limit: int | None) -> None:
    """Raise `ValueError` for a text that is far too long, tokenising only as much as is needed to find out.

    Args:
        name (`str`): the name of the text in the message.
        text (`str`): any text.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        limit (`int`, *optional*): the most tokens. `None`: any number. A piece with more than twice as many is too long
            wherever it was cut; for shorter texts the caller checks after tokenising all of it.
    """
    piece = _FIRST_PIECE * (limit or 0)
    while limit is not None and 0 < piece < len(text):
        found = len(tokenizer(text[:piece], verbose=False)["input_ids"])
        if found > 2 * limit:
            raise ValueError(
                f"{name} is too long: the first {piece:,} of its {len(text):,} characters have {found:,} tokens, and "
                f"at most {limit:,} are allowed. Shorten it, or split it."
            )
        piece *= 4


def text_list(texts: str | Sequence[str], *, no_files: bool = False) -> list[str]:
    """Convert one text or several to a list; `TypeError` for anything else.

    Args:
        texts (`str` or `Sequence[str]`): an ordered collection, so no sets; no mappings, whose keys would be read.
        no_files (`bool`, *optional*, defaults to `False`): refuse file names, see `check_no_file`. Leave it off for
            texts from untrusted sources, which must not learn which files exist.
    """
    if not isinstance(texts, str | Iterable) or isinstance(texts, bytes | Mapping | Set):
        raise TypeError(f"Expected a text or a list of texts, got {type(texts).__name__}.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if wrong := [f"text {i} is a {type(text).__name__}" for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise TypeError(f"Expected a text or a list of texts, but {', '.join(wrong[:3])}.")
    for text in texts if no_files else ():
        check_no_file(text)
    return texts


def check_text(name: str, text: str) -> None:
    """Raise for texts with a zero byte, as in binary files, or a lone surrogate, as in broken PDFs.

    Raises:
        TypeError: it is not a string.
        ValueError: it has a zero byte or a lone surrogate.
    """
    check_kind(name, text, str, "a text")
    if "\0" in text:
        raise ValueError(
            f"{name} has a zero byte at position {text.index(chr(0))}, so it is not plain text. Remove it."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character (a lone surrogate), {text[error.start]!r}, at position {error.start}, which "
            "tokenizers cannot encode. Replace it: text.encode('utf-8', 'replace').decode()."
        ) from error


_LONGEST_NAME = 4096
"""The most characters in a path: the limit of Linux, and more than most systems allow."""


def check_no_file(text: Any, remedy: str = ".read()") -> None:
    """Raise `ValueError` if a text is the name of a file, because the name and not the file's content would be written.

    Args:
        text (`Any`): the text to write. With a line break it is not taken for a name.
        remedy (`str`, *optional*): the code after `open(...)` in the message.
    """
    if isinstance(text, str) and len(text) <= _LONGEST_NAME and "\n" not in text and os.path.isfile(text):
        raise ValueError(
            f"The text is the name of a file, {text!r}; the name and not the file's content would be written. Pass the "
            f"content: open({text!r}){remedy}. To write the name itself, add a line break to it."
        )
