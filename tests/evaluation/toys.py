"""A task and a method, as small as possible: a class in one file each."""

from __future__ import annotations

from typing import Any

import pydantic
import torch

from evaluation.methods.base import OPTIONS
from evaluation.methods.prefix import Prefix, PrefixMethod
from evaluation.tasks import Task


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Echo(Task):
    """What is the last word?"""

    words: int = 6

    name = "echo"
    dataset = "echoes"

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Contexts of words."""
        contexts = [" ".join(f"w{(i * 7 + j) % 50}" for j in range(self.words)) for i in range(8)]
        return [{"context": text, "query": "Question", "target": text.split()[-1]} for text in contexts]

    def score(self, answer: str, accepted: list[str]) -> dict[str, float]:
        """Whether it is in the answer."""
        return {"heard": float(accepted[0] in answer)}


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class LastToken(PrefixMethod):
    """Memory is the embedding of the context's last token."""

    name = "last_token"
    title = "the last token"
    color, marker = "#e69f00", "P"

    def prefix(self, model: Any, context: torch.Tensor, lengths: torch.Tensor, steps: int) -> Prefix:
        """One vector."""
        last = context.gather(1, lengths[:, None] - 1)
        return Prefix(model.embed(last), torch.ones_like(lengths))
