"""Scores of answers, and standard errors of their means."""

from __future__ import annotations

import math

from torch import Tensor

from gradmem_adapter.training.metrics import score_answer


def score_texts(answer: str, accepted: list[str]) -> dict[str, float]:
    """Exact match and token F1 as defined by SQuAD, and ROUGE-L (F-measure), each for the best reference.

    Raises:
        ImportError: the package rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs: pip install 'gradmem-adapter[evaluation]'.") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in accepted)
    return score_answer(answer, accepted) | {"rouge_l": rouge}


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of values [n]; 0 for a single value, whose spread is unknown."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def placements(right: Tensor, wrong: Tensor) -> Tensor:
    """For each score in `right` `[n]`, the share of scores in `wrong` that are lower, with ties counting half. Their
    mean is the area under the ROC curve."""
    above, same = (right[:, None] > wrong).double(), (right[:, None] == wrong).double()
    return (above + same / 2).mean(1)
