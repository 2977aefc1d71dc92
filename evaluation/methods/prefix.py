"""The base class of all baselines: they answer from a prefix before the query."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pydantic
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.ops.padding import append, pad
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.read.loss import forward_at_targets
from gradmem_adapter.training.weights import load_trained_weights, save_trained_weights

from .base import OPTIONS, Method
from .shared_prefix import answer_on_one, can_share


class Prefix(NamedTuple):
    """The prefixes for queries on C contexts."""

    embeddings: Tensor
    """[C, P, d], right padded."""
    lengths: Tensor
    """[C], how many of the P positions are used."""

    def rows(self, index: Tensor) -> Prefix:
        """The prefix of each query, for index [R]; for index [R, S] those of S contexts side by side."""
        if index.dim() == 1:
            return Prefix(self.embeddings[index], self.lengths[index])
        first, *others = (self.rows(column) for column in index.unbind(1))
        embeddings, lengths = first
        for other in others:
            embeddings, _ = append(embeddings, lengths, other.embeddings)
            lengths = lengths + other.lengths
        return Prefix(embeddings, lengths)


class PrefixModel(nn.Module):
    """A causal LM on `[prefix(context); query]`, with the `forward` of `GradMemModel`.

    Args:
        backbone (`PreTrainedModel`): the causal LM; its trainable weights are trained.
        method (`PrefixMethod`): defines the prefix.
        memory (`Mapping`): fields of `GradMemConfig`, of which num_memory_tokens, memory_init_std and
            reconstruction_weight are used.
    """

    def __init__(self, backbone: PreTrainedModel, method: PrefixMethod, memory: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone, self.method = backbone, method
        self.num_memory_tokens = method.memory_tokens(memory)
        self.reconstruction_weight = float(memory.get("reconstruction_weight", 0.0))
        width = self.embed.weight.shape[1]
        deviation = memory.get("memory_init_std", 0.02)
        self.slots = nn.Parameter(torch.randn(self.num_memory_tokens, width) * deviation) if method.slots else None

    @property
    def embed(self) -> nn.Embedding:
        """The backbone's input embeddings."""
        return cast(nn.Embedding, self.backbone.get_input_embeddings())

    def prefix(self, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The prefix for right-padded contexts [C, N] of lengths [C]."""
        return self.method.prefix(self, context, lengths, steps)

    def forward(
        self,
        input_ids: Tensor,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        context_index: Tensor,
        labels: Tensor,
        write_steps: int = 1,
        attention_mask: Tensor | None = None,
        max_targets: int | None = None,
    ) -> GradMemOutput:
        """Queries [R, T], right padded, on contexts [C, N], as for `GradMemModel.forward`."""
        prefix = self.prefix(context_input_ids, context_attention_mask.sum(1), write_steps)
        embeddings, lengths = prefix.rows(context_index)
        tokens, places = append(embeddings, lengths, self.embed(input_ids))
        targets, _ = append(labels.new_full(embeddings.shape[:2], IGNORED), lengths, labels)
        inputs: dict[str, Any] = {"inputs_embeds": tokens, "use_cache": False, "return_dict": True}
        logits = None
        if max_targets is None:
            output = self.backbone(labels=targets, **inputs)
            logits = output.logits.gather(1, places[..., None].expand(-1, -1, output.logits.shape[-1]))
        else:
            output = forward_at_targets(self.backbone, targets, max_targets, **inputs)
        loss = output.loss
        if torch.is_grad_enabled():
            loss = loss + self.method.auxiliary_loss(self, prefix, context_input_ids, context_attention_mask)
        return GradMemOutput(
            loss=loss, target_loss=output.loss, logits=logits, correct=output.get("correct"),
            target_states=output.get("target_states"),
        )  # fmt: skip


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class PrefixMethod(Method):
    """A baseline, which defines the prefix of a query."""

    slots = False
    """Whether the model has m learned vectors."""

    @abstractmethod
    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The prefix for right-padded contexts [C, N] of lengths [C]."""

    def auxiliary_loss(self, model: PrefixModel, prefix: Prefix, context: Tensor, mask: Tensor) -> Tensor | float:
        """An additional loss in training."""
        return 0.0

    def build(self, backbone: PreTrainedModel, memory: Mapping[str, Any]) -> PrefixModel:
        """See `Method.build`; trains the LoRA of `lora_config` in `memory`, or else what `train_backbone` says."""
        lora = memory.get("lora_config")
        if lora is None:
            backbone.requires_grad_(bool(memory.get("train_backbone")))
        else:
            inject_adapter_in_model(LoraConfig(**lora), backbone)
        return PrefixModel(backbone, self, memory)

    def save(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        """Save the trained weights by name."""
        save_trained_weights(model, path)

    def load_weights(self, model: nn.Module, path: Path) -> None:
        """See `Method.load_weights`."""
        load_trained_weights(model, path)

    def read(self, model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], steps: int) -> Any:
        """The contexts themselves: prefixes are computed only for the contexts of a batch."""
        return contexts, steps

    def length(self, model: Any, context: list[int]) -> int:
        """The whole length, for a method that keeps the whole context."""
        return len(context)

    def batches(
        self, model: PrefixModel, before: Sequence[int], own: Sequence[int], reads: Sequence[Sequence[int]], tokens: int
    ) -> list[list[int]]:
        """See `Method.batches`. If a context is too long for eight queries per batch, its queries form one batch."""
        by_reads: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        shared = can_share(model.backbone)
        for row, (length, size, read) in enumerate(zip(before, own, reads, strict=True)):
            by_reads[tuple(read) if shared and length > max(tokens // 8, size) else ()].append(row)
        others = by_reads.pop((), [])
        found = super().batches(model, [before[i] for i in others], [own[i] for i in others], reads, tokens)
        return [*by_reads.values(), *([others[i] for i in rows] for rows in found)]

    def generate(
        self, model: Any, kept: Any, reads: list[list[int]], query: Tensor, mask: Tensor, **options: Any
    ) -> Tensor:
        """See `Method.generate`; a prefix that all queries share is computed once, if it is longer than they are."""
        contexts, steps = kept
        used = sorted({i for row in reads for i in row})
        context, counts = (t.to(query.device) for t in pad([contexts[i] for i in used], "right", 0))
        index = torch.tensor([[used.index(i) for i in row] for row in reads], device=query.device)
        prefix = model.prefix(context, counts.sum(1), steps)
        queries = [row[count.bool()] for row, count in zip(model.embed(query), mask, strict=True)]
        if prefix.embeddings.shape[1] > query.shape[1] and (index == index[0]).all() and can_share(model.backbone):
            (before,), (length,) = prefix.rows(index[:1])
            new = answer_on_one(model.backbone, before[:length], queries, options["max_new_tokens"])
            return pad(new, "right", options["pad_token_id"])[0]
        rows = [
            torch.cat([before[:length], row]) for before, length, row in zip(*prefix.rows(index), queries, strict=True)
        ]
        embeddings, attention = pad(rows, "left")
        output: Tensor = model.backbone.generate(inputs_embeds=embeddings, attention_mask=attention, **options)
        return output
