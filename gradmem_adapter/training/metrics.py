"""How a generated answer is scored against the accepted ones: exact match and token F1, as SQuAD does it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

Score: TypeAlias = Callable[[str, list[str]], dict[str, float]]
"""Scores a generated text against the accepted references; larger is better."""


def normalize_answer(text: str, *, lower: bool = True, punctuation: bool = True, articles: bool = True) -> str:
    """The text in lower case, without punctuation, articles and extra space; each can be left as it is."""
    if lower:
        text = text.lower()
    if punctuation:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if articles:
        text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def exact_match(
    prediction: str, references: Sequence[str], normalize: Callable[[str], str] = normalize_answer
) -> float:
    """1.0 where the prediction is one of the references once both are normalized, otherwise 0.0."""
    return float(any(normalize(prediction) == normalize(reference) for reference in references))


def token_f1(prediction: str, references: Sequence[str], normalize: Callable[[str], str] = normalize_answer) -> float:
    """The harmonic mean of precision and recall of words, for the reference that it is highest for."""
    return max(_f1(normalize(prediction).split(), normalize(reference).split()) for reference in references)


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:  # nothing to share: right if both say nothing
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def score_answer(
    prediction: str, references: list[str], normalize: Callable[[str], str] = normalize_answer
) -> dict[str, float]:
    """`exact_match` and `f1`, what `GradMemTrainer.evaluate` reports unless it is given another score."""
    return {
        "exact_match": exact_match(prediction, references, normalize),
        "f1": token_f1(prediction, references, normalize),
    }
