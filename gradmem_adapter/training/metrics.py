"""How a generated answer is scored against the accepted ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Score: TypeAlias = Callable[[str, list[str]], dict[str, float]]
"""Scores a generated text against the accepted references; larger is better."""


def score_answer(prediction: str, references: list[str]) -> dict[str, float]:
    """Exact match and token F1 as in SQuAD: ignoring case, punctuation, articles and extra space, each for the
    reference for which it is highest.

    Args:
        prediction (`str`): the generated text.
        references (`list[str]`): the accepted texts.

    Returns:
        `exact_match` and `f1`, from 0 to 1: what `GradMemTrainer.evaluate` reports unless it is given another score.
    """
    from torchmetrics.functional.text import squad  # takes seconds to import, and training alone does not need it

    answers: Any = {"text": references, "answer_start": [0] * len(references)}
    found = squad([{"prediction_text": prediction, "id": "0"}], [{"answers": answers, "id": "0"}])
    return {name: found[name].item() / 100 for name in ("exact_match", "f1")}
