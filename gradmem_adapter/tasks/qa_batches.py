"""Rows of texts as tensors on a device, where batches are drawn, so that a training step can be captured as a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.training.collator import GradMemCollator

Rows = Sequence[Mapping[str, Any]]
_PADDED = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Pool:
    """Contexts of up to N tokens and the questions on them."""

    contexts: Tensor
    """[C, N], right padded."""
    lengths: Tensor
    """[C]."""
    bounds: Tensor
    """[C], the upper bounds of the parts of [0, 1) that draw each context."""
    first: Tensor
    """[C], where each context's queries begin."""
    count: Tensor
    """[C], how many it has."""
    queries: Tensor
    """[R, T], query and target, right padded."""
    masks: Tensor
    """[R, T]."""
    labels: Tensor
    """[R, T], -100 but for the targets."""
    share: float
    """Of all training that falls to these contexts."""
    most_queries: int
    """More queries on a context than it has on average would be the same ones again."""
    most_targets: int
    """Target tokens of the longest target."""

    def sample(self, contexts: int, queries: int, side_by_side: int = 1) -> dict[str, Tensor]:
        """A batch as `GradMemModel.forward` takes it, by the device's default generator.

        Args:
            contexts: C contexts, drawn with replacement.
            queries: questions on each, drawn with replacement.
            side_by_side: S, the memories that each question is asked of: its own context's in a random place, and those
                of the next S - 1 contexts of the batch.
        """
        device = self.contexts.device
        # As numbers, not views: a graph captured now reads what is drawn when it is replayed.
        chosen = torch.searchsorted(self.bounds, torch.rand(contexts, device=device)).clamp(max=len(self.bounds) - 1)
        which = (torch.rand(contexts, queries, device=device) * self.count[chosen, None]).long()
        rows = (self.first[chosen, None] + which).flatten()
        index = torch.arange(contexts, device=device).repeat_interleave(queries)
        if side_by_side > 1:
            neighbours = (index[:, None] + torch.arange(side_by_side, device=device)) % contexts
            places = torch.rand(neighbours.shape, device=device).argsort(1)
            index = neighbours.gather(1, places)
        mask = torch.arange(self.contexts.shape[1], device=device) < self.lengths[chosen, None]
        return {
            "context_input_ids": self.contexts[chosen],
            "context_attention_mask": mask.long(),
            "input_ids": self.queries[rows],
            "attention_mask": self.masks[rows],
            "labels": self.labels[rows],
            "context_index": index,
        }


def make_pools(
    sources: Sequence[tuple[Rows, float]],
    collator: GradMemCollator,
    buckets: Sequence[int],
    device: torch.device | str,
    *,
    drop_longer: bool = False,
    query_tokens: int | None = None,
) -> list[Pool]:
    """Rows of several sources, by the length of their contexts.

    Args:
        sources: rows (as `GradMemCollator` takes them) and the share of training that each source has.
        buckets: N of the pools; the smallest that holds a context gets it.
        drop_longer: leave longer contexts out.
        query_tokens: leave queries out that have more tokens than this, with their targets.

    Raises:
        ValueError: a row is wrong, or a context is longer than the largest bucket; the message names both.
    """
    found: dict[int, list[tuple[dict[str, Any], float]]] = {size: [] for size in sorted(buckets)}
    total = sum(share for _, share in sources)
    for number, (rows, share) in enumerate(sources):
        for i, batch in enumerate(_encoded(number, rows, collator)):
            if query_tokens is not None:
                batch = _without_longer(batch, query_tokens)
                if not len(batch["input_ids"]):
                    continue
            length = batch["context_input_ids"].shape[1]
            size = next((size for size in found if length <= size), None)
            if size is None and drop_longer:
                continue
            if size is None:
                raise ValueError(
                    f"Row {i} of source {number} has a context of {length} tokens, and the largest bucket holds "
                    f"{max(found)}. Add a larger one to `buckets`, or set drop_longer."
                )
            found[size].append((batch, share / total / len(rows)))
    if not any(found.values()):
        raise ValueError(f"No row has a context of at most {max(found)} tokens, the largest bucket.")
    return [_pool(batches, size, device) for size, batches in found.items() if batches]


def _encoded(number: int, rows: Rows, collator: GradMemCollator) -> Iterator[dict[str, Any]]:
    """What the collator makes of each row of a source; many are tokenized at once."""
    for start in range(0, len(rows), 512):
        try:
            batch = collator(rows[start : start + 512], first=start)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Source {number}: {error}") from error
        counts = batch["context_index"].bincount().tolist()
        parts = {name: batch[name].split(counts) for name in ("input_ids", "attention_mask", "labels")}
        for row in range(len(counts)):
            length = int(batch["context_attention_mask"][row].sum())
            width = int(parts["attention_mask"][row].sum(1).max())
            contexts = {f"context_{name}": batch[f"context_{name}"][row, None, :length] for name in _PADDED}
            yield contexts | {name: part[row][:, :width] for name, part in parts.items()}


def _without_longer(batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A row's batch without the queries that have more than so many tokens."""
    kept = batch["attention_mask"].sum(1) <= tokens
    names = ("input_ids", "attention_mask", "labels")
    return batch | {name: batch[name][kept, :tokens] for name in names}


def _pool(batches: list[tuple[dict[str, Any], float]], size: int, device: torch.device | str) -> Pool:
    rows = [batch for batch, _ in batches]
    weights = torch.tensor([weight for _, weight in batches], dtype=torch.float64)
    counts = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str, width: int, value: int) -> Tensor:
        parts = [F.pad(row[name], (0, width - row[name].shape[1]), value=value) for row in rows]
        return torch.cat(parts).to(device)

    return Pool(
        contexts=padded("context_input_ids", size, 0),
        lengths=torch.cat([row["context_attention_mask"].sum(1) for row in rows]).to(device),
        bounds=(weights.cumsum(0) / weights.sum()).float().to(device),
        first=(counts.cumsum(0) - counts).to(device),
        count=counts.to(device),
        queries=padded("input_ids", longest, 0),
        masks=padded("attention_mask", longest, 0),
        labels=(labels := padded("labels", longest, IGNORED)),
        share=weights.sum().item(),
        most_queries=max(1, round(counts.float().mean().item())),
        most_targets=int((labels != IGNORED).sum(1).max()),
    )
