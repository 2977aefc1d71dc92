"""Which of a few states a question needs, by how well each explains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.store.choose import Choice

_WEIGHT = 0.4
"""Weight of one nat per token relative to the best score, tuned on a sample of SQuAD (docs/lab/LOG.md)."""
_AT_ONCE = 16
"""States per batch: the question is read after each of them at the same time."""


def by_likelihood(
    pipeline: GradMemPipeline, query: str, choices: Sequence[Choice], get: Callable[[Sequence[str]], MemoryState]
) -> list[Choice]:
    """Rerank choices by their scores s and by the mean log-likelihood of the question's tokens q behind each state M:

        s'(i)  =  s(i) / max_j s(j)  +  w log p(q | M_i)

    If no score is above 0, s(i) - max_j s(j) takes the place of the first term.

    Args:
        pipeline (`GradMemPipeline`): what is to read.
        query (`str`): the question.
        choices (`Sequence[Choice]`): best first.
        get (`Callable`): returns the states of keys.
    """
    before, after = _around(pipeline, query)
    if not after or not choices:
        return list(choices)
    best, scores = choices[0].score, list[float]()
    for begin in range(0, len(choices), _AT_ONCE):
        part = choices[begin : begin + _AT_ONCE]
        memory = get([choice.entry.key for choice in part])
        found = pipeline.model.log_likelihood([before] * len(part), [after] * len(part), memory)
        known = [choice.score / best if best > 0 else choice.score - best for choice in part]
        scores += [score + _WEIGHT * x for score, x in zip(known, found.tolist(), strict=True)]
    anew = [replace(choice, score=score) for choice, score in zip(choices, scores, strict=True)]
    return sorted(anew, key=lambda choice: -choice.score)


def _around(pipeline: GradMemPipeline, query: str) -> tuple[list[int], list[int]]:
    """The tokens before a question in the query format, and those of the question itself."""
    mark = "\ue000"  # a private-use character, which no format contains
    text, special = pipeline.format_query(mark)
    before, _, _ = text.partition(mark)
    tokenizer = pipeline.tokenizer
    own = tokenizer(query, add_special_tokens=False)["input_ids"]
    return tokenizer(before, add_special_tokens=special)["input_ids"], own
