"""Bulk WRITE: many contexts of mixed lengths, in batches that fit into memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradmem_adapter.ops.padding import pad
from gradmem_adapter.state import MemoryState
from gradmem_adapter.write.loop import sample_names


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of contexts in batches of similar length, the longest first: what cannot fit shows at once.

    A batch has at most `budget` tokens, padding counted, or is a single context.
    """
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= budget:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def write_batches(
    write: Callable[[Tensor, Tensor], MemoryState],
    contexts: Sequence[Tensor],
    budget: int,
    done: Callable[[int], None] = lambda contexts: None,
) -> MemoryState:
    """WRITE contexts in batches within a token budget, which is halved where memory does not suffice.

    Args:
        write: right-padded token ids [B, N] and their mask to B states.
        contexts: token ids [n] each.
        done: told the size of each batch after it.

    Returns:
        One state per context, in the order of `contexts`.

    Raises:
        torch.cuda.OutOfMemoryError: a single context does not fit; the message names it.
    """
    states: dict[int, MemoryState] = {}
    waiting, warned = batches([len(context) for context in contexts], budget), False
    while waiting:
        rows = waiting.pop(0)
        try:
            with sample_names(rows):
                written = write(*pad([contexts[i] for i in rows], "right"))
        except torch.cuda.OutOfMemoryError as error:
            if len(rows) == 1:
                raise torch.cuda.OutOfMemoryError(
                    f"Context {rows[0]} with {len(contexts[rows[0]])} tokens does not fit into the GPU's memory by "
                    "itself. Split it (MemoryState.concat joins the states of its parts), free memory, or load the "
                    "model in bfloat16."
                ) from error
        else:
            states |= zip(rows, written, strict=True)
            done(len(rows))
            continue
        # Only here, as the traceback of the error holds what the batch had on the GPU.
        torch.cuda.empty_cache()
        budget = min(budget, len(rows) * len(contexts[rows[0]])) // 2
        if not warned:
            warnings.warn(
                f"Out of memory at {len(rows)} contexts of up to {len(contexts[rows[0]])} tokens: going on with at "
                f"most {budget} tokens a batch. max_tokens={budget} spares the try.",
                RuntimeWarning,
                stacklevel=4,
            )
            warned = True
        left = [i for batch in (rows, *waiting) for i in batch]
        waiting = [[left[i] for i in batch] for batch in batches([len(contexts[i]) for i in left], budget)]
    return MemoryState.stack([states[i] for i in range(len(contexts))])


def token_ids(index: int, context: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """A context as a tensor.

    Raises:
        TypeError: it is none; the message names it by its index.
    """
    try:
        ids = torch.as_tensor(context, device=device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Context {index} must be token ids, got {type(context).__name__} ({error}).") from error
    return ids if ids.numel() else ids.long()  # an empty list has no type of its own


@contextmanager
def progress_bar(total: int, wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """Shows how many contexts are written. Args: wanted: None: where a person is looking on."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda contexts: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("WRITE"), BarColumn(), MofNCompleteColumn(), TextColumn("contexts"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("write", total=total)
        yield lambda contexts: bar.advance(task, contexts)
