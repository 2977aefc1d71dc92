"""The metrics of training and evaluation: sums over tokens, contexts and queries, and their means."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradmem_adapter.ops.cross_entropy import IGNORED, shifted_nll
from gradmem_adapter.outputs import GradMemOutput

NOT_FOR_THE_MODEL = (
    *("query_input_ids", "query_attention_mask", "targets", "write_steps"),
    *("text_input_ids", "text_attention_mask", "text_index", "taught"),
)
"""The fields of a batch that are not arguments of the model."""
MEANS = {
    "target_loss": "tokens",
    "distillation_loss": "tokens",
    "exact_match": "queries",
    "first_write_loss": "written",
    "last_write_loss": "written",
    "memory_norm": "memories",
    "write_steps": "contexts",
    "memory_grad_norm": "steps",
}
"""The reported metrics, with the count to divide each sum by; scores of answers are divided by the count of queries.

first_write_loss and last_write_loss are the write losses before the first and before the last write step;
`reconstruction_weight` applies to the latter. With one step they are equal. Without steps, both are the loss of the
memory that WRITE starts from. exact_match in training is the share of queries for which every target token is the first
choice, if batches have `max_targets`.
"""
COUNTS = {*MEANS.values(), "queries"}
NAMES = sorted({*MEANS, *COUNTS})


NO_TARGETS = (
    "has no target token: all its labels are -100. Check the rows' targets, and the collator if it is your own."
)
"""What is said of a step or a dataset whose losses are means over nothing."""


class Count(NamedTuple):
    """The counts of a batch, as scalars on the device."""

    tokens: Tensor
    """The number of target tokens."""
    contexts: Tensor


def count(batch: dict[str, Any], device: torch.device) -> Count:
    """The counts of a batch; `ValueError` if GradMem cannot be trained on it."""
    if "context_input_ids" not in batch or "labels" not in batch:
        raise ValueError(
            f"A batch needs context_input_ids and labels, but the collator returned {', '.join(batch)}. Use "
            "GradMemCollator."
        )
    tokens = (batch["labels"] != IGNORED).sum().to(device)
    return Count(tokens, torch.full_like(tokens, len(batch["context_input_ids"])))


def context_length(batch: dict[str, Any]) -> int:
    """The number of tokens in the longest context of a batch."""
    mask = batch.get("context_attention_mask")
    return batch["context_input_ids"].shape[1] if mask is None else int(mask.sum(1).max())


class Sums:
    """Sums since the last log, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(NAMES), device=device)

    def add(self, table: Tensor) -> None:
        """Add a table [names] from `in_order`."""
        self.values = self.values + table

    def means(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, all of which must call this."""
        return means(dict(zip(NAMES, accelerator.gather(self.values[None]).sum(0).tolist(), strict=True)))


def in_order(sums: dict[str, Tensor]) -> Tensor:
    """Sums by name as one tensor [names], with zero for missing names, which a CUDA graph can return."""
    zero = torch.zeros((), device=next(iter(sums.values())).device)
    return torch.stack([sums[name].detach().float() if name in sums else zero for name in NAMES])


def means(sums: dict[str, float]) -> dict[str, float]:
    """The mean of every sum whose count is not zero."""
    return {
        name: value / sums[MEANS.get(name, "queries")]
        for name, value in sums.items()
        if name not in COUNTS and sums.get(MEANS.get(name, "queries"))
    }


def write_lr_means(rates: Tensor) -> dict[str, float]:
    """The learned write learning rates [n] or [n, m, d] of the first steps by name, averaged over the memory."""
    means = (rates.flatten(1).mean(1) if rates.dim() > 1 else rates).tolist()
    return {f"write_lr_{k}" if len(means) > 1 else "write_lr": rate for k, rate in enumerate(means)}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The fields of a batch that the model's forward takes."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


def context_index(batch: dict[str, Any]) -> Tensor:
    """[R], the context of each query."""
    index: Tensor | None = batch.get("context_index")
    return torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device) if index is None else index


def per_context(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Sum values of queries [R] by context: [C]."""
    return values.new_zeros(len(batch["context_input_ids"])).index_add_(0, context_index(batch), values)


def batch_sums(batch: dict[str, Any], output: GradMemOutput, here: Count, steps: int) -> dict[str, Tensor]:
    """The sums of training after K = `steps` write steps, scalars."""
    sums = {name: value.sum() for name, value in _written(batch, output, steps).items()}
    if output.correct is not None:
        correct = output.correct.float()
        sums |= {"exact_match": correct.sum(), "queries": torch.full_like(correct[0], len(correct))}
    return sums | {"target_loss": cast(Tensor, output.target_loss) * here.tokens, "tokens": here.tokens}


def context_sums(batch: dict[str, Any], output: GradMemOutput, steps: int) -> dict[str, Tensor]:
    """The sums of evaluation after K = `steps` write steps, [C] each."""
    nll, labels = output.target_nll, batch["labels"]
    if nll is None:  # of a module without memory, from the logits, which predict no first label
        nll, labels = shifted_nll(cast(Tensor, output.logits), labels.long()), labels[:, 1:]
    return _written(batch, output, steps) | {
        "target_loss": per_context(nll, batch),
        "tokens": per_context((labels != IGNORED).sum(1).float(), batch),
        "queries": per_context(torch.ones_like(nll), batch),
    }


def _written(batch: dict[str, Any], output: GradMemOutput, steps: int) -> dict[str, Tensor]:
    """Metrics of WRITE for each context, [C] each; for a model without memory, only the number of contexts."""
    ones = torch.ones(len(batch["context_input_ids"]), device=batch["context_input_ids"].device)
    found = {"write_steps": ones * steps, "contexts": ones}
    if output.memory is not None:
        found |= {"memory_norm": output.memory.detach().float().flatten(1).norm(dim=1), "memories": ones}
    if output.write_losses is not None:
        losses = output.write_losses.detach().float()
        known = losses.shape[1]
        found |= {
            "first_write_loss": losses[:, 0] if known else 0 * ones,
            "last_write_loss": losses[:, -1] if known else 0 * ones,
            "written": ones * (known > 0),
        }
    return found
