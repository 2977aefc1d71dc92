"""Whether token ids are the model's."""

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
    """Token ids, labels or indices as int64, which embeddings, losses and indexing take; what is none of them as it is.

    Args:
        ids (`Tensor`, *optional*): integers of any width.
    """
    whole = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids.long() if whole else ids


def check_tokens(name: str, input_ids: Tensor, attention_mask: Tensor | None, backbone: PreTrainedModel) -> None:
    """Raise unless token ids are of the model and their mask fits.

    Args:
        name (`str`): what the caller named the ids, for messages.
        input_ids (`Tensor`): integers `[B, N]`.
        attention_mask (`Tensor`, *optional*): `[B, N]`.
        backbone (`PreTrainedModel`): the model, whose embeddings say which ids there are.

    Raises:
        TypeError: `input_ids` is no tensor of integers.
        ValueError: a shape or an id does not fit.
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
            "shapes; pass both as the tokenizer returned them."
        )
    vocabulary = cast(Tensor, backbone.get_input_embeddings().weight).shape[0]
    if not capturing() and input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= vocabulary):
        raise ValueError(
            f"{name} holds token ids from {int(input_ids.min())} to {int(input_ids.max())}; the model knows 0 to "
            f"{vocabulary - 1}. Is the tokenizer the model's own? Tokens that were added to it need "
            "model.resize_token_embeddings(len(tokenizer)) before an adapter is attached."
        )


def check_pad_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raise `ValueError` where batches cannot be padded: there is no token for it, or the model has no such token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): whose pad token it is, or its end token where it has none.
        model (`nn.Module`): the causal LM, with an adapter or without.
    """
    name, pad = ("eos", tokenizer.eos_token_id) if tokenizer.pad_token_id is None else ("pad", tokenizer.pad_token_id)
    if pad is None:
        raise ValueError("The tokenizer has neither a pad nor an eos token; set tokenizer.pad_token.")
    rows = cast(Any, model).get_input_embeddings().weight.shape[0]
    if pad >= rows:
        raise ValueError(
            f"The tokenizer's {name} token has the id {pad}, and the model knows 0 to {rows - 1}: it was added to the "
            "tokenizer alone. Set tokenizer.pad_token to one that the model has, such as tokenizer.eos_token, or call "
            "model.resize_token_embeddings(len(tokenizer)) before an adapter is attached."
        )


_OF_ITS_OWN = ("attention_mask", "logits_to_keep", "negative_prompt_ids", "negative_prompt_attention_mask")
"""Arguments that go with memory, or are of another prompt."""


def check_token_types(token_type_ids: Tensor | None) -> None:
    """Raise `ValueError` for token types other than 0, which a memory in between has none of.

    Args:
        token_type_ids (`Tensor`, *optional*): `[B, N]`, as tokenizers return them: zeros for single texts.
    """
    if token_type_ids is not None and not capturing() and token_type_ids.any():
        raise ValueError(
            "token_type_ids other than 0 cannot be combined with memory, which has none of its own. Write and read "
            "single texts."
        )


def check_token_options(options: dict[str, Any], shape: torch.Size) -> None:
    """Raise `ValueError` for arguments with an entry for each token of a query: memory stands before, and has none.

    Args:
        options (`dict[str, Any]`): what the backbone is to be given besides. Token types of 0 are taken out, so that
            `**tokenizer(...)` can be passed.
        shape (`torch.Size`): `[B, T]`, of the query.
    """
    check_token_types(options.pop("token_type_ids", None))
    for name, value in options.items():
        if name == "position_ids" and value is not None:
            raise ValueError("position_ids cannot be combined with memory: they follow from the prefix and the mask.")
        if isinstance(value, Tensor) and value.shape[:2] == shape and name not in _OF_ITS_OWN:
            raise ValueError(
                f"{name} has an entry for each token of the query, and memory, which stands before it, has none. Leave "
                "it out, or give prefix_embeddings(state) to the backbone yourself."
            )


_FIRST_PIECE = 16
"""Characters for each token that a text may have: few texts have so many in a token."""


def check_fits(name: str, text: str, tokenizer: Any, limit: int | None) -> None:
    """Raise `ValueError` for a text that is too long by far, of which no more is tokenised than shows it.

    Args:
        name (`str`): what the text is called in the message.
        text (`str`): any text.
        tokenizer (`PreTrainedTokenizerBase`): what splits it.
        limit (`int`, *optional*): how many tokens it may have. `None`: any number. With twice as many in a piece it is
            too long wherever the piece was cut; with fewer the caller finds out when all of it is tokenised.
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
    """One text as a list of one, several as a list; `TypeError` for anything else.

    Args:
        texts (`str` or `Sequence[str]`): in order, which sets are not; no mapping, whose keys would be read.
        no_files (`bool`, *optional*, defaults to `False`): refuse names of files, see `check_no_file`. Not where the
            texts are parts of others, which may be of anybody who is to find out nothing about the files here.
    """
    if not isinstance(texts, str | Iterable) or isinstance(texts, bytes | Mapping | Set):
        raise TypeError(f"A text or a list of texts can be written, got {type(texts).__name__}.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if wrong := [f"text {i} is a {type(text).__name__}" for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise TypeError(f"A text or a list of texts can be written: {', '.join(wrong[:3])}.")
    for text in texts if no_files else ():
        check_no_file(text)
    return texts


def check_text(name: str, text: str) -> None:
    """Raise for what is no text: with a zero byte, as other files have it, or half of a character, as broken PDFs do.

    Args:
        name (`str`): what the text is called in the message.
        text (`str`): what a tokenizer is to be given.

    Raises:
        TypeError: it is something else.
        ValueError: a zero byte, or half a character.
    """
    check_kind(name, text, str, "a text")
    if "\0" in text:
        raise ValueError(f"{name} has a zero byte at place {text.index(chr(0))}, which no text has. Leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {text[error.start]!r}, at place {error.start}, which no tokenizer reads. "
            "Replace it: text.encode('utf-8', 'replace').decode()."
        ) from error


_LONGEST_NAME = 4096
"""Characters of a file's name, with its directories: Linux takes no longer one, and others hardly."""


def check_no_file(text: Any, remedy: str = ".read()") -> None:
    """Raise `ValueError` if a text is the name of a file, which would be written in place of what is in it.

    Args:
        text (`Any`): what is to be written. With a line end in it it is no name.
        remedy (`str`, *optional*): what follows `open(...)` in the message.
    """
    if isinstance(text, str) and len(text) <= _LONGEST_NAME and "\n" not in text and os.path.isfile(text):
        raise ValueError(
            f"The text is the name of a file, {text!r}, and would be written itself. Pass what is in the file: "
            f"open({text!r}){remedy}. If the name itself is meant, put a line end behind it."
        )
