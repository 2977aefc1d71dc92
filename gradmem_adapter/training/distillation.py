"""Distillation: the distributions of a teacher that reads the context as text, as additional targets."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradmem_adapter.ops.cross_entropy import IGNORED, FusedCrossEntropy, Head, sequence_nll
from gradmem_adapter.ops.output_head import output_head, trains_head
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.read.loss import before_targets
from gradmem_adapter.utils.backbone import first_position, trunk
from gradmem_adapter.utils.capture import capturing

from .cuda_graph import usual_attention
from .sums import context_index


class Distillation:
    """The divergence of a student that reads memory from a teacher that reads the context itself.

    For each target token y_i, with softmax(logits / T) on both sides:

        T^2 KL(p_teacher(. | [C; query; y_<i]) || p_student(. | [M; query; y_<i]))

    (Hinton et al., arXiv 1503.02531; with a context only on the teacher's side: Snell et al., arXiv 2209.15189).

    Args:
        teacher (`nn.Module`): a causal LM of Transformers with the student's vocabulary, possibly with a PEFT adapter.
            It is not trained, and keeps its dtype.
        temperature (`float`): T.

    Raises:
        TypeError: the teacher is not a causal LM.
        ValueError: it shares layers with the student, has another vocabulary, or its attention does not support masks.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, temperature: float) -> None:
        self.teacher, self.student = _backbone(teacher), _backbone(student)
        self.temperature = temperature
        if set(self.teacher.modules()) & set(self.student.modules()):
            raise ValueError(
                "The teacher shares layers with the trained backbone. Load it a second time for the teacher."
            )
        if not usual_attention(self.teacher):
            raise ValueError(
                "The teacher reads several queries after one context, so its attention must support masks. Load it "
                "with attn_implementation='sdpa'; a model with attention windows cannot be a teacher."
            )
        sizes = [model.get_output_embeddings().weight.shape[0] for model in (self.teacher, self.student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The teacher predicts {sizes[0]} tokens and the student {sizes[1]}. Use a teacher with the same "
                "vocabulary."
            )
        self.vocabulary = sizes[0]
        self.teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def teach(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with the teacher's hidden states before the targets.

        A context is read once for all of its queries, which follow it and do not attend to each other.

        Args:
            batch (`dict`): a batch from `Batches.batch` or `GradMemCollator`.

        Returns:
            `dict`: the batch, with `max_targets` (n) and `taught` `[R, n, h]`.

        Raises:
            ValueError: a query reads several states, but the batch has no `text_index` to say which text answers it.
        """
        texts = batch.get("text_input_ids", batch["context_input_ids"])
        lengths = batch.get("text_attention_mask", batch["context_attention_mask"]).sum(1, keepdim=True)
        index = batch["text_index"] if "text_index" in batch else context_index(batch)
        if index.dim() > 1:
            raise ValueError(
                "Queries read several states side by side, so the teacher needs text_index in the batch. See "
                "Batches.batch."
            )
        ids, (contexts, width), length = batch["input_ids"], texts.shape, batch["input_ids"].shape[1]
        rank = (index[:, None] == index).tril(-1).sum(1)  # the index of a query among those on its context
        slots = len(index) // contexts if capturing() else int(rank.max()) + 1
        queries = ids.new_zeros(contexts, slots, length).index_put((index, rank), ids)
        options = {"device": ids.device}
        behind = torch.arange(slots, **options).repeat_interleave(length) + 1
        segment = torch.cat([behind.new_zeros(width), behind])  # 0: the context; i: query i
        places = torch.arange(len(segment), **options)
        positions = torch.cat(
            [places[:width].expand(contexts, -1), lengths + torch.arange(length, **options).repeat(slots)], dim=1
        )
        text = (segment == 0) & (places < lengths)
        seen = (places <= places[:, None]) & ((segment == segment[:, None]) | text[:, None])
        output = trunk(self.teacher)(
            input_ids=torch.cat([texts, queries.flatten(1)], dim=1),
            attention_mask=seen[:, None],
            position_ids=positions + first_position(self.teacher),
            use_cache=False,
            return_dict=True,
        )
        hidden = output.last_hidden_state[:, width:].unflatten(1, (slots, length))[index, rank]
        most = batch["max_targets"] if "max_targets" in batch else int((batch["labels"] != IGNORED).sum(1).max())
        return batch | {"max_targets": most, "taught": before_targets(hidden, batch["labels"], most)[0]}

    def divergence(self, output: GradMemOutput, batch: dict[str, Any]) -> Tensor:
        """The divergence summed over all target tokens, a scalar.

        Args:
            output (`GradMemOutput`): the student's output for a batch.
            batch (`dict`): the same batch, as returned by `teach`.
        """
        taught = batch["taught"]
        states = cast(Tensor, output.target_states)[:, : taught.shape[1]]
        targets = (batch["labels"] != IGNORED).sum(1, keepdim=True)
        mask = torch.arange(states.shape[1], device=states.device) < targets
        head, guide = output_head(self.student), output_head(self.teacher)
        if trains_head(self.student):
            return _divergence(head(states), guide(taught), mask, self.temperature).sum()
        fused = _fused(guide, self.temperature)
        return sequence_nll(states, taught, mask, head, self.vocabulary, fused, count_correct=False)[0].sum()


def _fused(guide: Head, temperature: float) -> FusedCrossEntropy:
    """For `sequence_nll`, so that both models' logits exist only for a few positions at a time. The teacher's hidden
    states `[B, n, h]` take the place of target tokens."""

    def value(logits: Tensor, taught: Tensor, mask: Tensor, _: bool) -> tuple[Tensor, None]:
        return _divergence(logits, guide(taught), mask, temperature), None

    def value_and_gradient(logits: Tensor, taught: Tensor, mask: Tensor, _: bool) -> tuple[Tensor, None, Tensor]:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            found = _divergence(leaf, guide(taught), mask, temperature)
            (gradient,) = torch.autograd.grad(found.sum(), leaf)
        return found.detach(), None, gradient

    return FusedCrossEntropy(value, value_and_gradient)


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits `[B, n, V]`, summed over the positions that count: `[B]`."""
    log_softmax = partial(F.log_softmax, dim=-1, dtype=torch.promote_types(student.dtype, torch.float32))
    divergence = F.kl_div(
        log_softmax(student / temperature), log_softmax(teacher / temperature), reduction="none", log_target=True
    )
    return temperature**2 * divergence.sum(-1).masked_fill(~mask, 0).sum(-1)


def _backbone(model: nn.Module) -> PreTrainedModel:
    """The causal LM in a model."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None or found.get_output_embeddings() is None:
        raise TypeError(
            f"The teacher must be a causal LM of Transformers, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    return found
