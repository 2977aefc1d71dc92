"""Training on questions about texts, GradMem and baselines alike, and answering with what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gradmem_adapter.baselines import Prefix, PrefixModel
from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.pipeline import format_query, pad
from gradmem_adapter.state import MemoryState
from gradmem_adapter.training.collator import GradMemCollator
from gradmem_adapter.training.graphed_run import run_graphed, scalars
from gradmem_adapter.write.batching import batches

from .qa_batches import Pool, Rows, make_pools
from .qa_recipe import QAKind, QARecipe
from .saved import load_baseline, load_recipe_fields


@dataclass(frozen=True)
class _Plan:
    """A recipe on the pools of its data, as `run_graphed` takes it."""

    recipe: QARecipe
    pools: list[Pool]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def kind_at(self, step: int) -> QAKind:
        return self.recipe.kind_of(self.pools, step)


def train_qa(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: QARecipe,
    output: Path,
    *,
    device: torch.device | str,
    **options: Any,
) -> bool:
    """Train `model` (from `recipe.build()`) in place, going on from `output/last` if a run was interrupted there.

    Args:
        options: as for `run_graphed`: max_seconds, log_every, save_seconds, stop, callback.

    Returns:
        Whether the run is done.

    Raises:
        TrainingDiverged: the loss is no longer finite; `output/last` is the last good state.
    """
    device = torch.device(device)
    collator = GradMemCollator(tokenizer, query_format=recipe.query_format)
    sources = [(source.training_rows(), source.share) for source in recipe.sources]
    pools = make_pools(
        sources, collator, recipe.buckets, device, drop_longer=recipe.drop_longer, query_tokens=recipe.query_tokens
    )
    model.to(device).eval()

    def loss(kind: QAKind) -> dict[str, Tensor]:
        pool = pools[kind.pool]
        batch = pool.sample(kind.contexts, min(recipe.queries, pool.most_queries), kind.side_by_side)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            output = model(**batch, write_steps=kind.write_steps, max_targets=pool.most_targets)
        return scalars(output, output.correct)

    return run_graphed(model, loss, _Plan(recipe, pools), output, device=device, **options)


def load_qa(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, PreTrainedTokenizerBase, QARecipe]:
    """A model that `save_model` saved, its tokenizer, and how it was trained.

    Raises:
        FileNotFoundError: there is none.
    """
    recipe = QARecipe.of(load_recipe_fields(path))
    if recipe.method == "gradmem":
        return *load_checkpoint(path, device=device), recipe
    model, tokenizer = recipe.build()
    load_baseline(model, path)
    return model.to(device).eval(), tokenizer, recipe


# -------------------------------------------------------------------- answers


class Answerer:
    """Reads contexts once and answers questions on them, greedily, by whatever method was trained.

    Args:
        model: from `load_qa` or `train_qa`.
        steps: K, or passes.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        recipe: QARecipe,
        *,
        steps: int,
        max_new_tokens: int = 32,
        tokens: int = 16_384,
    ) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.steps, self.max_new_tokens, self.tokens = steps, max_new_tokens, tokens

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def answer(self, contexts: Sequence[str], queries: Sequence[str], reads: Sequence[Sequence[int]]) -> list[str]:
        """Answers to queries.

        Args:
            contexts: texts, each read once.
            reads: for each query the contexts that it is asked of, side by side, in order.
        """
        ids = [self.tokenizer(text)["input_ids"] for text in contexts]
        if isinstance(self.model, PeftModel):
            states = self.model.write_many(ids, steps=self.steps, progress=False, last_loss=False)
        answers: dict[int, str] = {}
        costs = [sum(len(ids[i]) for i in row) for row in reads] if not isinstance(self.model, PeftModel) else [
            self.recipe.num_memory_tokens * len(row) for row in reads
        ]  # fmt: skip
        for rows in batches([cost + 64 for cost in costs], self.tokens):
            texts = [format_query(queries[i], self.recipe.query_format, self.tokenizer) for i in rows]
            prompts = [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in texts]
            query, mask = (t.to(self.device) for t in pad(prompts, "left", int(self.tokenizer.pad_token_id)))
            chosen = [list(reads[i]) for i in rows]
            if isinstance(self.model, PeftModel):
                new = self._from_memory(states, chosen, query, mask)
            else:
                new = self._from_prefix(ids, chosen, query, mask)
            answers |= zip(rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
        return [answers[i].strip() for i in range(len(queries))]

    @property
    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}

    def _from_memory(self, states: MemoryState, reads: list[list[int]], query: Tensor, mask: Tensor) -> Tensor:
        memory = MemoryState.concat([states[[row[j] for row in reads]] for j in range(len(reads[0]))])
        model: Any = self.model
        output = model.generate(input_ids=query, attention_mask=mask, memory=memory, **self._options)
        return output[:, query.shape[1] :]

    def _from_prefix(self, ids: list[list[int]], reads: list[list[int]], query: Tensor, mask: Tensor) -> Tensor:
        assert isinstance(self.model, PrefixModel)  # for the type checker
        used = sorted({i for row in reads for i in row})
        context, counts = (t.to(self.device) for t in pad([ids[i] for i in used], "right", 0))
        with torch.no_grad():
            prefix: Prefix = self.model.prefix(context, counts.sum(1), self.steps)
        index = torch.tensor([[used.index(i) for i in row] for row in reads], device=self.device)
        return self.model.generate(prefix.rows(index), query, mask, **self._options)


def questions(rows: Rows) -> tuple[list[str], list[str], list[int], list[list[str]]]:
    """Contexts, queries, the context of each query, and its accepted answers."""
    contexts: list[str] = []
    queries: list[str] = []
    index: list[int] = []
    references: list[list[str]] = []
    for i, row in enumerate(rows):
        contexts.append(row["context"])
        several = "queries" in row
        asked = row["queries"] if several else [row["query"]]
        targets = row["targets"] if several else [row["target"]]
        accepted = row.get("answers") if several else ([row["answers"]] if row.get("answers") else None)
        queries += asked
        index += [i] * len(asked)
        references += accepted or [[target] for target in targets]
    return contexts, queries, index, references
