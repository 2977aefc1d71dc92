"""How far memory supports what is answered from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmem_adapter.read.likelihood import scores
from gradmem_adapter.state import MemoryState
from gradmem_adapter.texts import TextEncoder


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
