"""The forward and backward pass of a training step as one CUDA graph per kind of batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from gradmem_adapter.ops.attention import CAUSAL
from gradmem_adapter.utils.backbone import attention_windows
from gradmem_adapter.utils.capture import static_shapes
from gradmem_adapter.utils.graphs import GraphPool, one_capture
from gradmem_adapter.utils.parameters import parts_with_dropout

Batch: TypeAlias = dict[str, Any]
"""Tensors, and ints that select the computation."""
WARM_UP = 2
"""How many batches of a kind run without a graph before one is captured; the first run compiles."""
SHARE = 0.8
"""The share of a GPU's free memory that graphs may hold; in training, little else needs it."""


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, Tensor]
    reached: list[bool]


class GraphedBackward:
    """Forward and backward pass of a micro-batch, with all kernels launched at once.

    A small model computes faster than Python launches its kernels. Batches are of one kind if their tensors have the
    same shapes and their ints the same values. At the third batch of a kind, the passes are captured as a CUDA graph,
    which is then replayed on new tensors. On a CPU, every batch runs without a graph, and so does one whose graph would
    hold most of the GPU's memory.

    All graphs add to the same gradient tensors. These become the parameters' `.grad`, so that clipping, accumulation
    and optimizers work as usual. Set `.grad` to None (`zero_grad`) to start from zero.

    Args:
        run (`Callable`): takes a batch and returns the loss, which is differentiated, and a tensor to pass on.
        parameters (`Iterable[nn.Parameter]`): the trained parameters.
    """

    def __init__(self, run: Callable[[Batch], tuple[Tensor, Tensor]], parameters: Iterable[nn.Parameter]) -> None:
        self.run, self.parameters = run, list(parameters)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.device = self.parameters[0].device
        self._seen: Counter[Hashable] = Counter()
        if self.device.type == "cuda":
            self._graphs: GraphPool[_Graph] = GraphPool(self.device, SHARE)
            current = torch.cuda.current_stream(self.device)
            standard = torch.cuda.default_stream(self.device)  # on which nothing can be captured
            self._stream = torch.cuda.Stream(self.device) if current == standard else current

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the gradients of a batch to the parameters'; returns what `run` returns, detached.

        The next batch of the same kind overwrites the returned tensors.
        """
        if all(parameter.grad is None for parameter in self.parameters):
            torch._foreach_zero_(self.gradients)
        kind = _kind(batch)
        self._seen[kind] += 1
        if self.device.type != "cuda":
            *outputs, reached = self._passes(batch)
        elif self._seen[kind] <= WARM_UP or not (
            graph := self._graphs.get(kind, lambda pool: self._capture(batch, pool))
        ):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            # With the shapes of the later capture, so that nothing is left to compile during it.
            with torch.cuda.stream(self._stream), static_shapes():
                *outputs, reached = self._passes(batch)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        else:
            for name, tensor in graph.inputs.items():
                tensor.copy_(batch[name])
            graph.graph.replay()
            outputs, reached = list(graph.outputs), graph.reached
        for parameter, gradient, used in zip(self.parameters, self.gradients, reached, strict=True):
            if used:
                parameter.grad = gradient
        return outputs[0], outputs[1]

    def _passes(self, batch: Batch) -> tuple[Tensor, Tensor, list[bool]]:
        """Loss and table of a batch, and which parameters got a gradient."""
        loss, table = self.run(batch)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(total, part) for total, part in zip(self.gradients, found, strict=True) if part is not None]
        torch._foreach_add_([total for total, _ in pairs], [part for _, part in pairs])
        return loss.detach(), table, [part is not None for part in found]

    def _capture(self, batch: Batch, pool: Any) -> _Graph:
        inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL's process group may query events during the capture, which must not invalidate it.
        mode = "thread_local" if distributed.is_initialized() else "global"
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a capture uses its own memory pool and cannot free memory cached by others
        with one_capture, torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
            loss, table, reached = self._passes(batch | inputs)
        return _Graph(graph, inputs, (loss, table), reached)

    def average(self) -> None:
        """Average the gradients over all processes, in one message per dtype."""
        own = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        for dtype in {gradient.dtype for gradient in own}:
            gradients = [gradient for gradient in own if gradient.dtype == dtype]
            flat = cast(Tensor, reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean"))
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a stream other than the default one, which a capture must not wait for.

    DistributedDataParallel holds the autograd nodes that accumulate gradients, which keep the stream they were created
    on.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _kind(batch: Batch) -> Hashable:
    """The key of a kind of batch: everything that determines its kernels."""
    return tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in sorted(batch.items())
    )


@contextmanager
def maskless_attention(model: nn.Module) -> Iterator[None]:
    """Causal attention without masks, for batches that are padded on the right.

    During CUDA graph capture, Transformers cannot check whether a mask is needed, and attention with a mask is slow.
    Backbones with another kind of attention (windows, another implementation) keep it.
    """
    backbones = [
        module for module in model.modules() if isinstance(module, PreTrainedModel) and usual_attention(module)
    ]
    for backbone in backbones:
        backbone.config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.config._attn_implementation = "sdpa"


def usual_attention(backbone: PreTrainedModel) -> bool:
    """Whether attention is PyTorch's SDPA and attends to the whole sequence in every layer."""
    return backbone.config._attn_implementation == "sdpa" and not attention_windows(backbone)


def check_no_dropout(model: nn.Module) -> None:
    """Raise `ValueError` for a model that draws random numbers in training: a CUDA graph could not repeat them for the
    meta-gradient."""
    found = next((name for name, _ in parts_with_dropout(model)), None)
    if found is not None:
        raise ValueError(
            f"cuda_graphs=True trains without dropout, but {found!r} has dropout. Set it to 0 (lora_dropout=0.0 in the "
            "LoraConfig; attention_dropout=0.0, or the backbone's name for it, in from_pretrained), or leave "
            "cuda_graphs out."
        )
