"""Evaluation during training: losses, and the scores of greedy answers from memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.state import MemoryState

from .collator import GradMemCollator
from .compiled import uncompiled_layers
from .metrics import Score
from .saving import SavingTrainer
from .sums import NO_TARGETS, context_index, context_sums, means, model_inputs, per_context

SPARE_TOKENS = 8
"""How many tokens more than the longest target an answer may have in evaluation."""


class EvaluatingTrainer(SavingTrainer):
    """The part of `GradMemTrainer` that evaluates; it is not used by itself.

    Args:
        score (`Score`): scores an answer against its references.
        kwargs: as for `SavingTrainer`.
    """

    _eval_sums: dict[str, float]
    _new_tokens: int
    _batch: tuple[Tensor, int]
    """For the current batch: the context of each query [R], and the number of contexts."""

    def __init__(self, *, score: Score, **kwargs: Any) -> None:
        self.score = score
        super().__init__(**kwargs)

    @property
    def reconstruction_weight(self) -> float:
        """The weight of the last write loss in the outer loss."""
        return float(getattr(self.model if self.config is None else self.config, "reconstruction_weight", 0.0))

    @property
    def default_write_steps(self) -> int:
        """The default of K."""
        return 1 if self.config is None else self.config.write_steps

    @property
    def answers_queries(self) -> bool:
        """Whether evaluation generates answers. A module without an adapter is evaluated only by its losses."""
        return self.args.predict_with_generate and self.config is not None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate: losses and, with `predict_with_generate`, the scores of greedy answers, each a mean over all rows.

        Answers are read from memory that is written once per context. What `compute_metrics` names is reported beside
        this, or in its place where the name is the same.

        Returns:
            Transformers' `EvalLoopOutput`. Unless `prediction_loss_only`, it has a row for each query, context by
            context: `predictions` are token ids of the answers, and `label_ids` those of the targets, padded with -100;
            without `predict_with_generate` they are the logits, and the labels at the places of these.
        """
        self._eval_sums = {}
        self._new_tokens = self._max_new_tokens(dataloader.dataset)
        self.gather_function = self._gather_queries  # used until the loop has ended
        with uncompiled_layers(self.model):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if not self._eval_sums:
            raise ValueError("The evaluation dataset has no rows. Pass at least one.")
        found = means(self._eval_sums)
        if "target_loss" not in found:
            raise ValueError(f"The evaluation dataset {NO_TARGETS}")
        loss = found["target_loss"] + self.reconstruction_weight * found.get("last_write_loss", 0.0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in ({"loss": loss} | found).items()}
        return output._replace(metrics=metrics | (output.metrics or {}))

    def _max_new_tokens(self, dataset: Any) -> int:
        if self.args.generation_max_new_tokens is not None or not self.answers_queries:
            return self.args.generation_max_new_tokens or 0
        collator = self.data_collator
        if not isinstance(collator, GradMemCollator) or isinstance(dataset, IterableDataset):
            raise ValueError(
                "The length of answers cannot be found from an iterable dataset or with your own collator. Set "
                "generation_max_new_tokens."
            )
        return SPARE_TOKENS + max((collator.longest_target(dataset[i]) for i in range(len(dataset))), default=0)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Add a batch to the sums of the evaluation, separately for each context, so that contexts that only fill up
        the last batch of several processes can be left out.

        Returns:
            No loss, because the sums hold it; predictions and labels `[R, ...]` of the queries, see `evaluation_loop`.
        """
        inputs = self._prepare_inputs(inputs)
        steps = self.default_write_steps if self.args.eval_write_steps is None else self.args.eval_write_steps
        with torch.no_grad(), self.compute_loss_context_manager():
            output: GradMemOutput = model(**model_inputs(inputs), write_steps=steps)
            values = context_sums(inputs, output, steps)
            predictions, labels = cast(Tensor, output.logits), inputs["labels"]
            if self.answers_queries:
                with self.accelerator.autocast():
                    answers = self._answers(inputs, cast(Tensor, output.memory))
                scores = self._scores(inputs, answers)
                if taken := scores.keys() & {"loss", *values}:
                    raise ValueError(
                        f"A score must not be named {', '.join(sorted(taken))}, because evaluation already reports "
                        "that. Rename it."
                    )
                values |= scores
                # The same length in every batch, because Transformers would pad with -100, which is not a token to
                # decode.
                padding = self.processing_class.pad_token_id
                short = self._new_tokens - answers.shape[1]
                predictions = F.pad(answers, (0, short), value=IGNORED if padding is None else padding)
                labels = pad([row[row != IGNORED] for row in labels], "right", IGNORED)[0]
        table = self.accelerator.gather_for_metrics(torch.stack(list(values.values()), dim=1))
        for name, value in zip(values, table.double().sum(0).tolist(), strict=True):
            self._eval_sums[name] = self._eval_sums.get(name, 0.0) + value
        self._batch = context_index(inputs), len(inputs["context_input_ids"])
        return (None, None, None) if prediction_loss_only else (None, predictions, labels)

    def _gather_queries(self, rows: Tensor) -> Tensor:
        """Gather values of the queries of a batch, `[R, n, ...]`, from all processes: context by context, without
        contexts that only fill up the last batch."""
        index, contexts = self._batch
        counts = index.bincount(minlength=contexts)
        by_context = pad_sequence(rows[index.argsort(stable=True)].split(counts.tolist()), batch_first=True)
        by_context = self.accelerator.pad_across_processes(by_context, dim=1)
        by_context, counts = self.accelerator.gather_for_metrics((by_context, counts))
        return by_context[torch.arange(by_context.shape[1], device=counts.device) < counts[:, None]]

    def _answers(self, inputs: dict[str, Any], memory: Tensor) -> Tensor:
        """The greedy answer to each query of a batch, read from memory [C, m, d]: token ids [R, n]."""
        lengths = inputs["context_attention_mask"].sum(1)
        queries = inputs["query_input_ids"]
        sequences = cast(PeftModel, self.model).generate(
            queries,
            attention_mask=inputs["query_attention_mask"],
            memory=MemoryState(memory, lengths, memory.new_zeros(len(memory), 1), fingerprint=""),
            strict=False,  # it was just written
            context_index=context_index(inputs),
            max_new_tokens=self._new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.processing_class.pad_token_id,
        )
        return cast(Tensor, sequences[:, queries.shape[1] :])

    def _scores(self, inputs: dict[str, Any], answers: Tensor) -> dict[str, Tensor]:
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        scores = [self.score(text, references) for text, references in zip(texts, inputs["targets"], strict=True)]
        if any(score.keys() != scores[0].keys() for score in scores):
            raise ValueError("The score function must return the same names for every answer.")
        device = inputs["input_ids"].device
        return {
            name: per_context(torch.tensor([float(score[name]) for score in scores], device=device), inputs)
            for name in sorted(scores[0])
        }
