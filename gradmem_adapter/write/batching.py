"""Bulk WRITE: many contexts of mixed lengths, in batches that fit into memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.ops.padding import pad
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.kinds import as_indices, check_kind
from gradmem_adapter.utils.wording import number_of, numbered
from gradmem_adapter.write.context import check_contexts


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of contexts in batches of similar length, the longest first, so that one that does not fit fails early.

    Args:
        lengths (`Sequence[int]`): tokens of each context.
        budget (`int`): the most tokens in a batch, including padding; a single context may exceed it.
    """
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= budget:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def write_batches(
    write: Callable[[list[int], Tensor, Tensor], MemoryState],
    contexts: Sequence[Tensor],
    budget: int,
    done: Callable[[list[int], MemoryState], None] = lambda rows, states: None,
) -> MemoryState:
    """WRITE contexts in batches within a token budget.

    Args:
        write (`Callable`): maps indices of contexts, their right-padded token ids `[B, N]` and mask to B states.
        contexts (`Sequence[Tensor]`): token ids `[n]` each.
        budget (`int`): the most tokens in a batch, including padding.
        done (`Callable`, *optional*): called after each batch with its indices and states.

    Returns:
        `MemoryState`: one state per context, in the order of `contexts`.

    Raises:
        torch.cuda.OutOfMemoryError: a context does not fit even with the most frugal plan; the message names it.
    """
    order: list[int] = []
    states: list[MemoryState] = []
    for rows in batches([len(context) for context in contexts], budget):
        try:
            with numbered(rows):
                written = write(rows, *pad([contexts[i] for i in rows], "right"))
        except torch.cuda.OutOfMemoryError as error:
            raise torch.cuda.OutOfMemoryError(
                f"Context {number_of(rows[0])} with {len(contexts[rows[0]])} tokens does not fit into GPU memory, even "
                "alone in a batch. Split it (MemoryState.concat joins the states of the parts), free memory, or load "
                "the model in bfloat16."
            ) from error
        order += rows
        states.append(written)
        done(rows, written)
    return MemoryState.stack(states)[torch.tensor(order).argsort()]


def check_rows(
    contexts: Sequence[Tensor | Sequence[int]], backbone: PreTrainedModel, prefix_length: int
) -> list[Tensor]:
    """Check contexts and return their token ids as tensors on the CPU; a whole batch is later moved to the GPU at once.

    Args:
        contexts (`Sequence`): token ids `[n]` of each.
        backbone (`PreTrainedModel`): the model that is to write them.
        prefix_length (`int`): how many of the backbone's positions the memory takes.

    Raises:
        TypeError, ValueError: a context cannot be written; the message names it.
    """
    check_kind("contexts", contexts, Iterable, "a list with the token ids of each context")
    rows = [_token_ids(f"Context {number_of(index)}", context) for index, context in enumerate(contexts)]
    if not rows:
        raise ValueError("There is no context to write.")
    for index, row in enumerate(rows):
        name = f"Context {number_of(index)}"
        if row.dim() != 1:
            raise ValueError(f"{name} must be token ids of shape [n], got shape {tuple(row.shape)}.")
        with numbered([index]):
            check_contexts(row[None], None, backbone, prefix_length, name)
    return rows


def _token_ids(name: str, context: Tensor | Sequence[int]) -> Tensor:
    ids = as_indices(name, context, "token ids", torch.device("cpu"))
    return ids if ids.numel() else ids.long()  # an empty list has no type of its own


@contextmanager
def progress_bar(total: int | None, wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """Show how many contexts are written; yields the function to call with the number of newly written ones.

    Args:
        total (`int`, *optional*): how many there are. `None`: unknown.
        wanted (`bool`, *optional*): show the bar. `None`: only if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda contexts: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("WRITE"), BarColumn(), MofNCompleteColumn(), TextColumn("contexts"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("write", total=total)
        yield lambda contexts: bar.advance(task, contexts)
