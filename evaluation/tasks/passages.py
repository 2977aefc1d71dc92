"""Questions about passages: FairytaleQA, SQuAD, and whatever has the form of either."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import pydantic

from evaluation.data import Rows, qa_rows

from .base import OPTIONS, Task


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Passages(Task):
    """Passages with all questions on them.

    Args:
        source (`str`): a directory or a dataset on the hub, see `qa_rows`.
        hub (`dict`, *optional*): what `datasets.load_dataset` takes besides: name, revision, ...
    """

    source: str
    hub: dict[str, Any] = field(default_factory=dict)

    name = "passages"

    @property
    def dataset(self) -> str:
        """The last part of the source."""
        return self.source.rstrip("/").rpartition("/")[2]

    def rows(self, split: str) -> Rows:
        """See `Task.rows`."""
        return qa_rows(self.source, split, **self.hub)
