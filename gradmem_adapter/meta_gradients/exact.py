"""The exact meta-gradient: second order, reverse over reverse."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmem_adapter.meta_gradients.base import Gradients, MetaGradient, Step, vjp
from gradmem_adapter.ops.attention import (
    CAUSAL,
    TwiceDifferentiableAttention,
    double_backward_problem,
    recomputed_plainly,
)
from gradmem_adapter.utils.backbone import device_of
from gradmem_adapter.write.loss import write_gradient


class Exact(MetaGradient):
    """The gradient of the gradient: recompute the write gradient with a graph and differentiate it.

    This is done one step at a time, so training needs the memory of one step, however many there are.
    """

    def check(self, backbone: PreTrainedModel) -> None:
        """Raise unless the backbone's attention can be differentiated twice.

        "eager" is plain PyTorch, and `TwiceDifferentiableAttention` replaces SDPA. Any other implementation is tested,
        because a kernel whose backward is not itself differentiable may return wrong second derivatives without an
        error.
        """
        name = backbone.config._attn_implementation
        if name in (None, "eager", "sdpa", CAUSAL):
            return
        problem = double_backward_problem(ALL_ATTENTION_FUNCTIONS[name], backbone.dtype, device_of(backbone).type)
        if problem:
            raise NotImplementedError(
                f"meta_gradient='exact' needs attention that can be differentiated twice, but {name!r} cannot: "
                f"{problem}. Load the backbone with attn_implementation='sdpa', or choose meta_gradient='first_order'."
            )

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        writer = replace(step.writer, backbone=recomputed_plainly(step.writer.backbone))
        with TwiceDifferentiableAttention():
            gradient, values, _ = write_gradient(writer, step.state.memory, step.context, create_graph=True)
            return vjp([*step.update(gradient), values], [*step.inputs, *step.weights], [*after, losses])
