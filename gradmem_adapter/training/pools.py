"""Rows of texts as tokens in a few tensors, grouped by the length of their contexts; batches are drawn from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.utils.files import replacing
from gradmem_adapter.utils.wording import counted

from .collator import GradMemCollator

Rows: TypeAlias = Sequence[Mapping[str, Any]]
_NUMBERS = ("share", "most_queries", "most_targets")


@dataclass(frozen=True)
class Pool:
    """The contexts of one bucket and the queries on them, as tokens.

    Args:
        contexts: [C, N], right padded; tokens are kept as integers of 32 bits.
        lengths: [C], the number of tokens in each context.
        bounds: [C], the upper bounds of the intervals of [0, 1) that select each context.
        first, count: [C], the index of each context's first query, and the number of its queries.
        queries, masks, labels: [R, T], query and target, right padded; labels are -100 except for the targets.
        share: the share of training on these contexts.
        most_queries: the average number of queries per context; drawing more would repeat them.
        most_targets: the number of tokens in the longest target.
    """

    contexts: Tensor
    lengths: Tensor
    bounds: Tensor
    first: Tensor
    count: Tensor
    queries: Tensor
    masks: Tensor
    labels: Tensor
    share: float
    most_queries: int
    most_targets: int

    @property
    def length(self) -> int:
        """N, the length that contexts are padded to."""
        return self.contexts.shape[1]

    def to(self, device: torch.device | str) -> Pool:
        """The same pool on a device."""
        if self.contexts.device == torch.device(device):
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NUMBERS}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def sample(
        self,
        contexts: int,
        queries: int,
        side_by_side: int = 1,
        parts: int = 1,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """A batch for `GradMemModel.forward`, with the fields that a teacher needs (`Batches.batch`).

        Args:
            contexts: C, the number of contexts, drawn with replacement.
            queries: the number of queries on each, without repetition if it has enough.
            side_by_side: S, the number of states that each query reads, in random order: those of its own context, and
                others of the next contexts in the batch.
            parts: P, the number of states that a context is written into, each with a P-th of its tokens; these stay in
                order.
        """
        device = self.contexts.device
        options: dict[str, Any] = {"device": device, "generator": generator}
        chosen = torch.searchsorted(self.bounds, torch.rand(contexts, **options)).clamp(max=len(self.bounds) - 1)
        # One random draw per context, with queries at equal distances from it, so that none repeats while there are
        # others.
        places = (torch.rand(contexts, 1, **options) + torch.arange(queries, device=device)) / queries
        which = (places * self.count[chosen, None]).long().clamp(max=self.count[chosen, None] - 1)
        rows = (self.first[chosen, None] + which).flatten()
        own = torch.arange(contexts, device=device).repeat_interleave(queries)
        texts, lengths = self.contexts[chosen].long(), self.lengths[chosen]
        written, index = (texts, lengths), own
        if side_by_side > 1:
            others = torch.arange(side_by_side - parts, device=device)
            states = torch.cat(
                [
                    own[:, None] * parts + torch.arange(parts, device=device),
                    (own[:, None] + others + 1) % contexts * parts + others % parts,
                ],
                dim=1,
            )
            order = torch.rand(states.shape, **options)
            order[:, :parts] = order[:, :parts].sort(1).values
            index = states.gather(1, order.argsort(1))
            written = _cut(texts, lengths, parts)
        batch = {
            "context_input_ids": written[0],
            "context_attention_mask": _mask(*written),
            "input_ids": self.queries[rows].long(),
            "attention_mask": self.masks[rows].long(),
            "labels": self.labels[rows].long(),
            "context_index": index,
        }
        if side_by_side > 1:
            batch["text_index"] = own
        if parts > 1:
            batch |= {"text_input_ids": texts, "text_attention_mask": _mask(texts, lengths)}
        return batch


def _mask(ids: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def _cut(texts: Tensor, lengths: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Cut each of C texts [C, N] into P parts of about equal length; returns parts and lengths: [C P, N / P], [C P]."""
    starts = lengths[:, None] * torch.arange(parts, device=texts.device) // parts
    ends = torch.cat([starts[:, 1:], lengths[:, None]], dim=1)
    places = starts[..., None] + torch.arange(-(-texts.shape[1] // parts), device=texts.device)
    cut = texts.gather(1, places.clamp(max=texts.shape[1] - 1).flatten(1)).view(-1, places.shape[-1])
    return cut, (ends - starts).clamp(min=1).flatten()  # at least one token, if a text has fewer than P


def save_pools(pools: Sequence[Pool], path: str | Path) -> None:
    """Save the result of `make_pools` for `load_pools`, because tokenizing many texts takes minutes."""
    with replacing(Path(path)) as temporary:
        torch.save([vars(pool) for pool in pools], temporary)


def load_pools(path: str | Path) -> list[Pool]:
    """Load pools saved by `save_pools`."""
    return [Pool(**pool) for pool in torch.load(path, weights_only=True)]


def make_pools(
    sources: Sequence[tuple[Rows, float]],
    collator: GradMemCollator,
    buckets: Sequence[int] | None,
    *,
    drop_longer: bool = False,
    query_tokens: int | None = None,
) -> list[Pool]:
    """Group the rows of several sources by the length of their contexts; for the arguments see `RowBatches`."""
    encoded: list[tuple[str, dict[str, Tensor], float]] = []
    total = sum(share for _, share in sources)
    for number, (rows, share) in enumerate(sources):
        for i, batch in enumerate(_encoded(number, rows, collator)):
            kept = batch if query_tokens is None else _without_longer(batch, query_tokens)
            if len(kept["input_ids"]):
                encoded.append((f"Row {i} of source {number}", kept, share / total / len(rows)))
    sizes = sorted(buckets or _powers_of_two(max((_length(batch) for _, batch, _ in encoded), default=1)))
    found: dict[int, list[tuple[dict[str, Tensor], float]]] = {size: [] for size in sizes}
    for name, batch, weight in encoded:
        size = next((size for size in sizes if _length(batch) <= size), None)
        if size is not None:
            found[size].append((batch, weight))
        elif not drop_longer:
            raise ValueError(
                f"{name} has a context of {_length(batch)} tokens, but the largest bucket holds {sizes[-1]}. Add a "
                "larger bucket, or set drop_longer=True."
            )
    if not any(found.values()):
        raise ValueError(
            f"No row is left: all contexts are longer than {counted(sizes[-1], 'token')}, the largest bucket. Add a "
            "larger bucket."
        )
    return [_pool(batches, size) for size, batches in found.items() if batches]


def _length(batch: dict[str, Tensor]) -> int:
    return batch["context_input_ids"].shape[1]


def _powers_of_two(longest: int) -> list[int]:
    """64, 128, ... up to the first that is at least `longest`."""
    return [64 << i for i in range(max(0, math.ceil(math.log2(longest / 64))) + 1)]


def _encoded(number: int, rows: Rows, collator: GradMemCollator) -> Iterator[dict[str, Tensor]]:
    """The collator's tensors for each row of a source, without padding; many rows are tokenized at once."""
    for start in range(0, len(rows), 512):
        try:
            batch = collator([rows[i] for i in range(start, min(start + 512, len(rows)))], first=start)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Source {number}: {error}") from error
        counts = batch["context_index"].bincount().tolist()
        parts = {name: batch[name].split(counts) for name in ("input_ids", "attention_mask", "labels")}
        for row in range(len(counts)):
            length = int(batch["context_attention_mask"][row].sum())
            width = int(parts["attention_mask"][row].sum(1).max())
            contexts = {"context_input_ids": batch["context_input_ids"][row, None, :length]}
            yield contexts | {name: part[row][:, :width] for name, part in parts.items()}


def _without_longer(batch: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """A row's batch without the queries of more than `tokens` tokens."""
    kept = batch["attention_mask"].sum(1) <= tokens
    return batch | {name: batch[name][kept, :tokens] for name in ("input_ids", "attention_mask", "labels")}


def _pool(batches: list[tuple[dict[str, Tensor], float]], size: int) -> Pool:
    rows = [batch for batch, _ in batches]
    weights = torch.tensor([weight for _, weight in batches], dtype=torch.float64)
    counts = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str, width: int, value: int) -> Tensor:
        parts = [F.pad(row[name], (0, width - row[name].shape[1]), value=value).int() for row in rows]
        return torch.cat(parts)

    return Pool(
        contexts=padded("context_input_ids", size, 0),
        lengths=torch.tensor([_length(row) for row in rows]),
        bounds=(weights.cumsum(0) / weights.sum()).float(),
        first=counts.cumsum(0) - counts,
        count=counts,
        queries=padded("input_ids", longest, 0),
        masks=padded("attention_mask", longest, 0).bool(),
        labels=(labels := padded("labels", longest, IGNORED)),
        share=weights.sum().item(),
        most_queries=max(1, round(counts.float().mean().item())),
        most_targets=int((labels != IGNORED).sum(1).max()),
    )
