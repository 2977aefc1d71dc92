"""How far memory supports what is answered from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmem_adapter.read.likelihood import scores
from gradmem_adapter.state import MemoryState
from gradmem_adapter.texts import TextEncoder
from gradmem_adapter.utils.wording import counted

_OF_SEARCH = 6.0
"""What the best search score counts beside support, in log-odds; found on articles kept for validation (lab log)."""


def answer_scores(
    encoder: TextEncoder, input_ids: Tensor, mask: Tensor, new: Tensor, memory: MemoryState, options: dict[str, Any]
) -> list[float]:
    """The score of each answer, as `GradMemPipeline.generate` explains it, from 0 to 1.

    Args:
        encoder (`TextEncoder`): the model and its tokenizer.
        input_ids, mask (`Tensor`): `[B, T]`, prompts with padding on the left.
        new (`Tensor`): `[B x sequences, n]`, the tokens behind them; n may be 0 of an adapter that refuses.
        memory (`MemoryState`): one state for all prompts, or one per prompt.
        options (`dict`): those of `generate` that say where an answer ends and which state a prompt is asked of.
    """
    config, tokenizer = encoder.model.active_peft_config, encoder.tokenizer
    own = tokenizer.eos_token_id
    if config.refusal is None:
        end = options.get("eos_token_id", encoder.model.generation_config.eos_token_id)
        ends = {*(end if isinstance(end, list) else [end]), own if (pad := tokenizer.pad_token_id) is None else pad}
        ended = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in new.tolist()]
        answers = [row[: last + 1] for row, last in zip(new.tolist(), ended, strict=True)]
    else:
        refusal = tokenizer(config.refusal, add_special_tokens=False)["input_ids"]
        answers = [[*refusal, *([] if own is None else [own])]] * len(new)
    prompts = [ids[counts.bool()].tolist() for ids, counts in zip(input_ids, mask, strict=True)]
    index = options.get("context_index")
    if index is None:
        index = range(len(prompts)) if len(memory) > 1 else [0] * len(prompts)
    each = len(new) // len(prompts)  # several sequences of a prompt stand side by side
    found = encoder.model.log_likelihood(
        [prompt for prompt in prompts for _ in range(each)],
        answers,
        memory,
        context_index=torch.as_tensor(index).repeat_interleave(each, dim=0),
        strict=options.get("strict", True),
    )
    return scores(found, config.score_calibration, None if config.refusal is None else len(answers[0])).tolist()


def surest(supported: Sequence[float], search_scores: Sequence[float] | None = None) -> int:
    """The state that holds an answer most likely; of equals the first.

    With the scores s of the search that found the states, and p how far each supports an answer:

        argmax_i  log p_i / (1 - p_i)  +  6 s_i / max_j s_j

    Args:
        supported (`Sequence[float]`): of each state, from 0 to 1.
        search_scores (`Sequence[float]`, *optional*): as many, 0 or more.

    Raises:
        ValueError: there are not as many search scores as states.
    """
    odds = torch.tensor(supported, dtype=torch.float64)
    if search_scores is not None:
        if len(search_scores) != len(supported):
            raise ValueError(
                f"Got {counted(len(supported), 'state')} and {counted(len(search_scores), 'search score')}: give one "
                "for each."
            )
        found = torch.tensor(search_scores, dtype=torch.float64)
        odds = odds.logit(eps=1e-6) + _OF_SEARCH * found / found.max().clamp(min=torch.finfo(found.dtype).tiny)
    return int(odds.argmax())
