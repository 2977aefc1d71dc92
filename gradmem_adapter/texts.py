"""From texts to tokens: prompts and contexts as the model sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.peft_model import GradMemPeftModel
from gradmem_adapter.prompts import Prompt, format_query, prompt_list
from gradmem_adapter.read.prefix import check_queries
from gradmem_adapter.segments import Segment, segments, unknown_length
from gradmem_adapter.utils.backbone import device_of
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.tokens import check_fits, check_pad_token, check_text, text_list
from gradmem_adapter.utils.wording import number_of


class TextEncoder:
    """A model with memory and its tokenizer: the half of `GradMemPipeline` that knows tokens.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer, with a pad or an end token.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, GradMemConfig):
            raise TypeError(
                f"GradMemPipeline needs a model with a GradMem adapter, got {type(model).__name__}. Create one with "
                "get_peft_model(backbone, GradMemConfig(...)) or load_checkpoint(path)."
            )
        check_kind("tokenizer", tokenizer, Callable, "the tokenizer of the backbone")
        check_pad_token(tokenizer, model)
        self.model = cast(GradMemPeftModel, model)
        self.tokenizer = tokenizer

    @property
    def max_context_tokens(self) -> int | None:
        """The most tokens that a text to write may have, special ones included; None: the backbone sets no limit."""
        positions = self.model.positions
        return None if positions is None else positions - self.model.prefix_length

    def segments(
        self,
        text: str | Iterable[str] | Iterable[int],
        segment_tokens: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[Segment]:
        """Cut a text of any length at the ends of paragraphs, else sentences, else words. The text is read lazily.

        Args:
            text (`str`, `Iterable[str]` or `Iterable[int]`): the text; or its consecutive pieces, such as the lines of
                an open file; or its token ids.
            segment_tokens (`int`, *optional*): the most tokens in a segment, special ones included; None: two per
                memory vector, at most the adapter's trained length.
            overlap (`int`, *optional*): the most tokens that a segment repeats of the one before, unless a paragraph
                ended there; None: a sixteenth of a segment.

        Raises:
            ValueError: the trained length is unknown, or a segment would be longer than the model takes.
        """
        limit = self.model.active_peft_config.segment_tokens if segment_tokens is None else segment_tokens
        if limit is None:
            raise ValueError(unknown_length("pass segment_tokens."))
        if (most := self.max_context_tokens) is not None and limit > most:
            raise ValueError(f"A segment may have at most {most} tokens, the limit of the model, got {limit}.")
        return segments(text, self.tokenizer, limit, limit // 16 if overlap is None else overlap)

    def format_query(
        self,
        prompt: Prompt,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, bool]:
        """The text the model sees for a prompt, and whether it still needs the tokenizer's special tokens.

        Args:
            prompt (`str` or `list[dict]`): a text or chat messages.
            tools (`list[dict]`, *optional*): tools for chat templates that support them, as JSON schemas.
            chat_template_kwargs (`Mapping`, *optional*): other arguments for the chat template.
        """
        own = self.model.active_peft_config.query_format
        return format_query(prompt, own, self.tokenizer, tools, chat_template_kwargs)

    def encode_prompts(
        self,
        prompts: Sequence[Prompt],
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts as the model sees them.

        Args:
            prompts (`Sequence`): texts or chat messages.
            tools, chat_template_kwargs: as for `format_query`.

        Returns:
            Token ids `[B, T]`, left padded, and their mask.

        Raises:
            ValueError: there is no prompt, or one cannot be formatted or is too long for the model.
        """
        formatted = [self.format_query(prompt, tools, chat_template_kwargs) for prompt in prompt_list(prompts)]
        for i, (text, _) in enumerate(formatted):
            check_text(f"Prompt {i}", text)
            check_fits(f"Prompt {i}", text, self.tokenizer, self.model.positions)
        return self.pad_prompts(
            [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in formatted]
        )

    def pad_prompts(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad the tokens of prompts, for `generate_ids`.

        Args:
            rows (`Sequence[Sequence[int]]`): the tokens of each prompt.

        Returns:
            Token ids `[B, T]`, left padded, and their mask, on the model's device.

        Raises:
            ValueError: there is no prompt.
        """
        check_queries(len(rows))
        return self._pad(rows, "left")

    def encode_contexts(self, texts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts as WRITE reads them.

        Args:
            texts (`str` or `Sequence[str]`): one text or several.

        Returns:
            Token ids `[B, N]`, right padded, and their mask.
        """
        return self._pad(self._context_ids(texts), "right")

    def _context_ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        texts = text_list(texts)
        if not texts:
            raise ValueError("There is no text to write.")
        if empty := [str(number_of(i)) for i, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"Context {', '.join(empty)} is empty: there is nothing to write.")
        most = self.max_context_tokens
        for i, text in enumerate(texts):
            check_text(f"Context {number_of(i)}", text)
            check_fits(f"Context {number_of(i)}", text, self.tokenizer, most)
        return cast(list[list[int]], self.tokenizer(texts)["input_ids"])

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        input_ids, mask = pad(rows, side, self._pad_token_id)
        device = device_of(cast(PreTrainedModel, self.model.get_base_model()))
        return input_ids.to(device), mask.to(device)

    @property
    def _pad_token_id(self) -> int:
        """The pad token, or the end token if there is none."""
        pad = self.tokenizer.pad_token_id
        return cast(int, self.tokenizer.eos_token_id if pad is None else pad)

    def generation_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options for `model.generate`, with the tokenizer and the pad token where needed.

        Args:
            options (`dict`): the options given to `generate`; left unchanged.
        """
        options = dict(options)
        if options.get("stop_strings") is not None:
            options.setdefault("tokenizer", self.tokenizer)
        if self.model.generation_config.pad_token_id is None:
            options.setdefault("pad_token_id", self._pad_token_id)
        return options
