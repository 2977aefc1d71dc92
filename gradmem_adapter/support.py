"""How well memory supports answers, and the choice of a state to answer a prompt from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmem_adapter.prompts import Prompt, prompt_list
from gradmem_adapter.read.likelihood import scores
from gradmem_adapter.state import MemoryState, check_state
from gradmem_adapter.texts import TextEncoder
from gradmem_adapter.utils.wording import counted

_OF_SEARCH = 6.0
"""The weight of the best search score relative to support, in log-odds; found on validation articles (lab log)."""


class Selected(NamedTuple):
    """What to answer a prompt from, as returned by `GradMemPipeline.select`.

    Args:
        memory (`MemoryState`): one state to read: one of the given states, or several side by side.
        states (`list[int]`): the indices of the states it is made of.
        support (`float`, *optional*): how well it supports an answer, from 0 to 1. None: not requested, or the adapter
            was not trained to refuse.
    """

    memory: MemoryState
    states: list[int]
    support: float | None


class StateSelector(TextEncoder):
    """The part of `GradMemPipeline` that tells how well states support an answer before there is one."""

    def support(
        self, prompts: Prompt | Sequence[Prompt], *, memory: MemoryState, tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, strict: bool = True,
    ) -> list[float]:  # fmt: skip
        """How well states support answers to prompts, without generating the answers.

        Args:
            prompts (`str`, `list[dict]` or a list of either): one prompt, asked of each state by itself, or several.
            memory (`MemoryState`): for one prompt, any number of states; for several, one for all or one per prompt.
            tools, chat_template_kwargs, strict: as for `encode_prompts` and `generate`.

        Returns:
            `list[float]`: for each state or prompt, the score from 0 to 1 that `generate` returns with an answer.

        Raises:
            ValueError: the adapter was not trained to refuse (`GradMemConfig.refusal`); scores then need answers.
        """
        if not self.refuses:
            raise ValueError(
                "This adapter was not trained to refuse (GradMemConfig.refusal is None), so it can score only answers. "
                "Use generate(..., return_scores=True)."
            )
        check_state("memory", memory)
        if not (batch := prompt_list(prompts)):
            return []
        ids, mask = self.encode_prompts(batch, tools, chat_template_kwargs)
        if len(ids) == 1:
            ids, mask = ids.expand(len(memory), -1), mask.expand(len(memory), -1)
        return answer_scores(self, ids, mask, ids.new_empty(len(ids), 0), memory, {"strict": strict})

    def select(
        self, prompt: Prompt, *, memory: MemoryState | list[MemoryState], side_by_side: bool | None = None,
        search_scores: Sequence[float] | Callable[[], Sequence[float]] | None = None, support: bool = False, **how: Any,
    ) -> Selected:  # fmt: skip
        """Choose what to answer a prompt from: the one of several states that holds an answer, or all side by side.

        An adapter that was trained to refuse (`GradMemConfig.refusal`) tells which state holds an answer, and answers
        better from that one alone. With other adapters, all states are read.

        Args:
            prompt (`str` or `list[dict]`): a text or chat messages.
            memory (`MemoryState` or a list of them): any number of states.
            side_by_side (`bool`, *optional*): True: all states; False: the state most likely to hold an answer, the
                first if several are equal; None: as the adapter was trained.
            search_scores (`Sequence[float]`, *optional*): how well a search matched each state (`Choice.score`), which
                is then taken into account as well; or a function that returns these scores, called only when they are
                needed.
            support (`bool`, *optional*, defaults to `False`): also report how well memory supports an answer when there
                is nothing to choose. Takes one pass.
            how: other arguments of `support`.

        Raises:
            ValueError: one of several states is to be chosen, but the adapter was not trained to refuse; or there are
                not as many search scores as states.
        """
        batches = memory if isinstance(memory, list) else [memory]
        for batch in batches:
            check_state("memory", batch)
        states = [state for batch in batches for state in batch]
        if side_by_side is None:
            side_by_side = not self.refuses
        if side_by_side or len(states) < 2:
            read = MemoryState.concat(states)
            supported = self.support([prompt], memory=read, **how)[0] if support and self.refuses else None
            return Selected(read, list(range(len(states))), supported)
        supports = self.support([prompt], memory=MemoryState.stack(states), **how)
        best = surest(supports, search_scores() if callable(search_scores) else search_scores)
        return Selected(states[best], [best], supports[best])

    @property
    def refuses(self) -> bool:
        """Whether the adapter was trained to say that memory does not hold an answer."""
        return self.model.active_peft_config.refusal is not None


def answer_scores(
    encoder: TextEncoder, input_ids: Tensor, mask: Tensor, new: Tensor, memory: MemoryState, options: dict[str, Any]
) -> list[float]:
    """The score of each answer, from 0 to 1, as documented in `GradMemPipeline.generate`.

    Args:
        encoder (`TextEncoder`): the model and its tokenizer.
        input_ids, mask (`Tensor`): `[B, T]`, prompts with padding on the left.
        new (`Tensor`): `[B x sequences, n]`, the tokens after them; n may be 0 if the adapter was trained to refuse.
        memory (`MemoryState`): one state for all prompts, or one per prompt.
        options (`dict`): the options of `generate` that determine where an answer ends and which state a prompt reads.
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
    each = len(new) // len(prompts)  # several sequences of a prompt are adjacent
    found = encoder.model.log_likelihood(
        [prompt for prompt in prompts for _ in range(each)],
        answers,
        memory,
        context_index=torch.as_tensor(index).repeat_interleave(each, dim=0),
        strict=options.get("strict", True),
    )
    return scores(found, config.score_calibration, None if config.refusal is None else len(answers[0])).tolist()


def surest(supported: Sequence[float], search_scores: Sequence[float] | None = None) -> int:
    """The index of the state most likely to hold an answer, the first if several are equal.

    With the scores s of the search that found the states, and p for how well each supports an answer:

        argmax_i  log p_i / (1 - p_i)  +  6 s_i / max_j s_j

    Args:
        supported (`Sequence[float]`): p for each state, from 0 to 1.
        search_scores (`Sequence[float]`, *optional*): one for each state, 0 or more.

    Raises:
        ValueError: there are not as many search scores as states.
    """
    odds = torch.tensor(supported, dtype=torch.float64)
    if search_scores is not None:
        if len(search_scores) != len(supported):
            raise ValueError(
                f"Got {counted(len(supported), 'state')} and {counted(len(search_scores), 'search score')}. Pass one "
                "score for each state."
            )
        found = torch.tensor(search_scores, dtype=torch.float64)
        odds = odds.logit(eps=1e-6) + _OF_SEARCH * found / found.max().clamp(min=torch.finfo(found.dtype).tiny)
    return int(odds.argmax())
