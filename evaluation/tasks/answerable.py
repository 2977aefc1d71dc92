"""Whether memory knows what it does not hold: questions on what was written, and questions on other texts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pydantic
import torch
from peft import PeftModel
from torch import Tensor

from evaluation.data import questions
from evaluation.scores import placements
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.pipeline import GradMemPipeline

from .base import OPTIONS, Measurement, QuestionTask

if TYPE_CHECKING:
    from evaluation.run import Answerer

BATCH = 16
"""Questions per batch."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Answerable(QuestionTask):
    """Every question is asked of its own passage and of another one, and the score must tell them apart."""

    name = "answerable"

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """The area under the ROC curve: the mean over answerable questions of the share of others with a lower score.

        `seed` draws the other passages, and with `limit` all passages. The facts include the calibration that would fit
        these scores: use it if `split` is for validation.

        Raises:
            TypeError: the model has no memory states.
            ValueError: there is only one passage.
        """
        model = answerer.model
        if not isinstance(model, PeftModel):
            raise TypeError("The task answerable scores answers from memory states, so it needs the method gradmem.")
        draw = random.Random(seed)
        rows = list(self.rows(split))
        rows = rows if limit is None else draw.sample(rows, min(limit, len(rows)))
        if len(rows) < 2:
            raise ValueError(
                f"The task answerable also asks each question of another passage, but it has only one of the split "
                f"{split!r} of {self.source!r}. Add passages, or allow more (--limit)."
            )
        contexts, queries, own, references = questions(rows)
        other = [draw.choice([i for i in range(len(contexts)) if i != c]) for c in own]
        ids = [list(row) for row in answerer.tokenizer(contexts)["input_ids"]]
        memory = answerer.config.method.read(model, answerer.tokenizer, ids, answerer.steps)
        pipeline = GradMemPipeline(model, answerer.tokenizer)
        answers = []
        for context in (own, other):
            for i in range(0, len(queries), BATCH):
                part: dict[str, Any] = {"memory": memory, "context_index": torch.tensor(context[i : i + BATCH])}
                part |= {"max_new_tokens": self.max_new_tokens, "do_sample": False}
                answers += pipeline.generate(queries[i : i + BATCH], return_scores=True, **part)
        scores = torch.tensor([score for _, score in answers], dtype=torch.float64)
        right, wrong = scores.chunk(2)
        kind = torch.cat([torch.ones_like(right), torch.zeros_like(wrong)])
        return Measurement(
            {"auc": placements(right, wrong), "brier": (scores - kind) ** 2},
            {
                "context_tokens": sum(map(len, ids)) / len(ids),
                "score_calibration": fitted(scores, kind, model.active_peft_config),
            },
            {"checkpoint": answerer.checkpoint},
            [
                {"query": query, "answer": answer, "accepted": accepted, "score": score, "answerable": answerable}
                for query, (answer, score), accepted, answerable in zip(
                    queries * 2, answers, references * 2, kind.tolist(), strict=True
                )
            ],
        )


def fitted(scores: Tensor, kind: Tensor, config: GradMemConfig) -> list[float]:
    """The scale and the offset of the logistic map that fits `kind` `[n]` (1 or 0) best. It would replace the one that
    made the scores."""
    scale, offset = config.score_calibration or (1.0, 0.0)
    as_they_are = config.score_calibration is None and config.refusal is None
    mapped = scores.clamp(min=1e-12).log() if as_they_are else (scores.logit(eps=1e-12) - offset) / scale
    found = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(found[0] * mapped + found[1], kind)
        value.backward()
        return value

    optimizer.step(loss)
    return [round(value, 4) for value in found.tolist()]
