"""Ready batches, drawn on the device by the number of a training step: few shapes, so that steps can be captured."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import distributed
from torch.utils.data import Dataset

from gradmem_adapter.utils.wording import counted

from .arguments import GradMemTrainingArguments
from .collator import GradMemCollator
from .pools import Pool, Rows, make_pools


class Batches(Dataset[Any]):
    """A `train_dataset` for `GradMemTrainer` that makes whole batches itself, in `batch`.

    A batch depends on its number and the seed alone: a resumed run draws the same batches, and the stages of a
    curriculum can go by the number. Batches of one kind have the same shapes, as `cuda_graphs` requires.

    Args:
        seed (`int`, *optional*, defaults to `0`): seed of everything that is drawn.
        steps (`int`, *optional*): the number of batches (in an epoch); None: as many as training asks for.
    """

    def __init__(self, *, seed: int = 0, steps: int | None = None) -> None:
        self.seed, self.steps = seed, steps

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError(
                f"{type(self).__name__} has no length, because it makes batches for as long as training lasts. Pass "
                "steps, or set max_steps."
            )
        return self.steps

    def batch(self, step: int, device: torch.device) -> dict[str, Any]:
        """Batch number `step`, counted from 0.

        With gradient accumulation, an optimizer step takes several batches. With several processes, each draws rows of
        its own (by `generator`), and all draw the same shapes and K (by `choices`).

        Args:
            step (`int`): the number of the batch.
            device (`torch.device`): where to put its tensors.

        Returns:
            `context_input_ids`, `context_attention_mask` [C, N]; `input_ids`, `attention_mask`, `labels` [R, T];
            `context_index` [R], or [R, S] for S states side by side; all right padded, on the device. Optionally the
            ints `write_steps` (K; default: as the trainer draws it) and `max_targets` (the most labels in a query,
            which saves computing the logits of all other tokens). For a teacher, if S is more than 1: `text_index` [R],
            the text that answers each query, with equally many queries on each text, and, unless the texts are the
            contexts, `text_input_ids` and `text_attention_mask`.
        """
        raise NotImplementedError

    @property
    def trained_length(self) -> int | None:
        """Length in tokens of the longest context, for the adapter's configuration; None: not known."""
        return None

    @property
    def process(self) -> int:
        """The number of this process among those that train together."""
        return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

    def lr_factor(self, step: int) -> float:
        """The factor on the learning rate of optimizer step `step`, for stages with a rate of their own."""
        return 1.0

    def choices(self, step: int) -> random.Random:
        """Random numbers that determine the kind of batch `step`; the same in all processes."""
        return random.Random(f"{self.seed}:{step}")

    def generator(self, step: int, device: torch.device | str) -> torch.Generator:
        """Random numbers on the device for the contents of batch `step`; different in each process."""
        number = random.Random(f"{self.seed}:{step}:{self.process}").getrandbits(63)
        return torch.Generator(device).manual_seed(number)


class RowBatches(Batches):
    """Batches of rows of texts, kept as tokens on the device, with contexts padded to a few lengths.

    Args:
        rows (`Sequence`): rows as `GradMemCollator` takes them; or several `(rows, share)`, where the share is how much
            of training goes to these rows; or the `pools` of another `RowBatches`.
        collator (`GradMemCollator`): turns the rows into tokens.
        buckets (`Sequence[int]`, *optional*): contexts are padded to the smallest of these lengths that holds them;
            None: 64, 128, 256, ... as far as needed.
        tokens (`int`, *optional*): the most context tokens in a batch, padding included; None: as many as `contexts`
            gives.
        contexts (`int`, *optional*, defaults to `64`): the most contexts in a batch.
        queries (`int`, *optional*, defaults to `2`): queries on each context of a batch, at most as many as contexts of
            this length have on average.
        side_by_side (`Sequence`, *optional*, defaults to `(1,)`): the kind of each batch is drawn from these. S: each
            query is asked of S states, its own context's at a random place among those of other contexts. [S, P]: also,
            each context is cut into P parts that are written by themselves, and P of the S states are its own. With S
            states, a context has `queries` / S queries, at least one, because S times as much is read.
        write_steps (`Sequence[int]`, *optional*): K of each batch is drawn from these; None: the trainer draws it.
        write_steps_side_by_side (`Sequence[int]`, *optional*): the same for batches with several states; keep it to few
            values, as each kind of batch is compiled and captured separately. None: as for the others.
        drop_longer (`bool`, *optional*, defaults to `False`): leave out contexts longer than the largest bucket.
        query_tokens (`int`, *optional*): leave out queries that have more tokens than this, with their targets.
        seed (`int`, *optional*, defaults to `0`): seed of what is drawn.
        steps (`int`, *optional*): batches in an epoch; None: as many as give each context one turn on average.

    Raises:
        ValueError: a row is invalid, a context is longer than the largest bucket, or a batch cannot hold the contexts
            that a query is asked of; the message says which.
    """

    def __init__(
        self,
        rows: Rows | Sequence[tuple[Rows, float]] | Sequence[Pool],
        collator: GradMemCollator,
        *,
        buckets: Sequence[int] | None = None,
        tokens: int | None = None,
        contexts: int = 64,
        queries: int = 2,
        side_by_side: Sequence[int | Sequence[int]] = (1,),
        write_steps: Sequence[int] | None = None,
        write_steps_side_by_side: Sequence[int] | None = None,
        drop_longer: bool = False,
        query_tokens: int | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError("There are no rows to make batches from.")
        if isinstance(rows[0], Pool):
            self.pools = list(cast(Sequence[Pool], rows))
        else:
            sources = cast(Any, rows if isinstance(rows[0], tuple) else [(rows, 1.0)])
            self.pools = make_pools(sources, collator, buckets, drop_longer=drop_longer, query_tokens=query_tokens)
        for name, choices in (("write_steps", write_steps), ("write_steps_side_by_side", write_steps_side_by_side)):
            if choices is not None and not _integers(choices, 0):
                raise ValueError(f"{name} must be a non-empty list of non-negative integers, got {choices!r}.")
        self.tokens, self.contexts, self.queries = tokens, contexts, queries
        self.side_by_side = _states_and_parts(side_by_side)
        self.write_steps = write_steps
        self.write_steps_side_by_side = write_steps if write_steps_side_by_side is None else write_steps_side_by_side
        longest, most = self.longest_context, max(states for states, _ in self.side_by_side)
        if contexts < most or (tokens is not None and tokens < longest * most):
            raise ValueError(
                f"A batch must hold the {counted(most, 'context')} of {counted(longest, 'token')} that a query reads, "
                f"but contexts={contexts} and tokens={tokens} (None: any number) allow less. Raise them, or use "
                "shorter buckets."
            )
        mean = sum(pool.share * self.batch_size(pool, 1) for pool in self.pools)
        own = math.ceil(sum(len(pool.contexts) for pool in self.pools) / mean)
        super().__init__(seed=seed, steps=own if steps is None else steps)

    @classmethod
    def of(cls, rows: Any, collator: Any, args: GradMemTrainingArguments) -> RowBatches:
        """The batches of rows for a run with `cuda_graphs`, as set in its arguments.

        Raises:
            ValueError: the rows have no length, or the collator is not a `GradMemCollator`.
        """
        if not isinstance(collator, GradMemCollator) or not hasattr(rows, "__len__"):
            raise ValueError(
                "cuda_graphs=True needs batches of few shapes. Use rows with a length and a GradMemCollator, from "
                "which RowBatches are made, or pass your own Batches as train_dataset."
            )
        return cls(
            rows,
            collator,
            buckets=args.context_buckets,
            tokens=args.tokens_per_batch,
            contexts=args.per_device_train_batch_size,
            queries=args.queries_per_context,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    @property
    def longest_context(self) -> int:
        """Length in tokens of the longest bucket that has contexts."""
        return max(pool.length for pool in self.pools)

    @cached_property
    def trained_length(self) -> int:
        """See `Batches.trained_length`."""
        return max(int(pool.lengths.max()) for pool in self.pools)

    def batch_size(self, pool: Pool, side_by_side: int) -> int:
        """The number of contexts in a batch."""
        most = self.contexts if self.tokens is None else min(self.tokens // pool.length, self.contexts)
        return max(side_by_side, most)

    def batch(self, step: int, device: torch.device) -> dict[str, Any]:
        draw = self.choices(step)
        number = draw.choices(range(len(self.pools)), [pool.share for pool in self.pools])[0]
        single = None if self.write_steps is None else draw.choice(self.write_steps)
        states, parts = draw.choice(self.side_by_side)
        several = self.write_steps_side_by_side
        write_steps = single if states == 1 or several is None else draw.choice(several)
        pool = self.pools[number] = self.pools[number].to(device)
        queries = max(1, min(self.queries, pool.most_queries) // states)
        batch = pool.sample(
            self.batch_size(pool, states), queries, states, parts, generator=self.generator(step, device)
        )
        steps = {} if write_steps is None else {"write_steps": write_steps}
        return batch | steps | {"max_targets": pool.most_targets}


def _integers(values: Any, least: int) -> bool:
    return isinstance(values, list | tuple | range) and len(values) > 0 and all(
        type(value) is int and value >= least for value in values
    )  # fmt: skip


def _states_and_parts(choices: Any) -> list[tuple[int, int]]:
    """The values of `side_by_side`, as pairs of S and P."""
    pairs = [(choice, 1) if isinstance(choice, int) else choice for choice in choices]
    if not pairs or not all(_integers(pair, 1) and len(pair) == 2 and pair[1] <= pair[0] for pair in pairs):
        raise ValueError(
            "side_by_side must be a non-empty list of positive integers, or of pairs [states, parts] of them with "
            f"states >= parts, got {choices!r}."
        )
    return [tuple(pair) for pair in pairs]
