"""How far memory supports what is answered from it, and which of several states a prompt is answered from."""

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
"""What the best search score counts beside support, in log-odds; found on articles kept for validation (lab log)."""


class Selected(NamedTuple):
    """What a prompt is to be answered from: what `GradMemPipeline.select` returns.

    Args:
        memory (`MemoryState`): one state to read: one of those there were, or several side by side.
        states (`list[int]`): the indices of those that it is made of.
        support (`float`, *optional*): how far it holds an answer, from 0 to 1. None: that was not asked for, or the
            adapter was not trained to refuse.
    """

    memory: MemoryState
    states: list[int]
    support: float | None


class StateSelector(TextEncoder):
    """The part of `GradMemPipeline` that knows how far states hold an answer, before there is one."""

    def support(
        self, prompts: Prompt | Sequence[Prompt], *, memory: MemoryState, tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, strict: bool = True,
    ) -> list[float]:  # fmt: skip
        """How far states hold answers to prompts, which are not computed for it.

        Args:
            prompts (`str`, `list[dict]` or a list of either): one, which each state is asked by itself, or several.
            memory (`MemoryState`): any number of states for one prompt; for several one for all, or one per prompt.
            tools, chat_template_kwargs, strict: as for `encode_prompts` and `generate`.

        Returns:
            `list[float]`: of each state or prompt the score that `generate` gives with an answer, from 0 to 1.

        Raises:
            ValueError: the adapter was not trained to refuse (`GradMemConfig.refusal`); scores need answers then.
        """
        if not self.refuses:
            raise ValueError("This adapter was not trained to say what memory does not hold: it scores answers alone.")
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
        """What of several states a prompt is best answered from: the one that holds an answer, or all side by side.

        An adapter that was trained to refuse (`GradMemConfig.refusal`) tells which state holds an answer, and answers
        better from that one alone. Others read all of them.

        Args:
            prompt (`str` or `list[dict]`): a text or chat messages.
            memory (`MemoryState` or a list of them): any number of states.
            side_by_side (`bool`, *optional*): True: all states; False: the one that holds an answer most likely, of
                equals the first; None: as the adapter was trained.
            search_scores (`Sequence[float]`, *optional*): how well a search found each (`Choice.score`), which counts
                beside that; or what gives them, called where they count.
            support (`bool`, *optional*, defaults to `False`): say how far memory holds an answer, also where there is
                nothing to choose. It takes a pass.
            how: what else `support` takes.

        Raises:
            ValueError: one of several states is to be found, and the adapter was not trained to refuse; or search
                scores are not as many as states.
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
