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
"""Tensors, and ints that decide what is done with them."""
WARM_UP = 2
"""How often a kind of batch is run as it is before it is captured; the first time compiles what is to be compiled."""
SHARE = 0.8
"""The share of a GPU's free memory that graphs may hold: in training they are what the memory is for."""


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, Tensor]
    reached: list[bool]


class GraphedBackward:
    """Forward and backward pass of a micro-batch, whose kernels are launched at once.

    A small model computes faster than Python launches its kernels. Batches are of one kind if their tensors have the
    same shapes and their ints the same values. From the third batch of a kind on, the passes are captured as a CUDA
    graph and from then on replayed on the new tensors. On the CPU every batch runs as it is, and so does one whose
    graph would hold more than most of the GPU's memory.

    The gradients are always in the same tensors, which every graph adds to: they become the parameters' `.grad`, so
    that clipping, accumulation and any optimizer work on them as usual. Set them to None (`zero_grad`) to start anew.

    Args:
        run (`Callable`): takes a batch and returns the loss, which is differentiated, and a tensor to be handed back.
        parameters (`Iterable[nn.Parameter]`): what is trained.
    """

    def __init__(self, run: Callable[[Batch], tuple[Tensor, Tensor]], parameters: Iterable[nn.Parameter]) -> None:
        self.run, self.parameters = run, list(parameters)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.device = self.parameters[0].device
        self._seen: Counter[Hashable] = Counter()
        if self.device.type == "cuda":
            self._graphs: GraphPool[_Graph] = GraphPool(self.device, SHARE)
            current = torch.cuda.current_stream(self.device)
            standard = torch.cuda.default_stream(self.device)  # by which nothing can be captured
            self._stream = torch.cuda.Stream(self.device) if current == standard else current

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the gradients of a batch to the parameters'; returns what `run` returns, detached.

        The tensors returned are written anew by the next batch of the same kind.
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
            self._stream.wait_stream(torch.cuda.current_stream())
            # With the shapes of the capture that follows: what is compiled now must not be compiled in it.
            with torch.cuda.stream(self._stream), static_shapes():
                *outputs, reached = self._passes(batch)
            torch.cuda.current_stream().wait_stream(self._stream)
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
        """Loss and table of a batch, and which parameters a gradient was added to."""
        loss, table = self.run(batch)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(total, part) for total, part in zip(self.gradients, found, strict=True) if part is not None]
        torch._foreach_add_([total for total, _ in pairs], [part for _, part in pairs])
        return loss.detach(), table, [part is not None for part in found]

    def _capture(self, batch: Batch, pool: Any) -> _Graph:
        inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        graph = torch.cuda.CUDAGraph()
        # The threads of NCCL's process group may ask for events meanwhile, which is nothing to the capture.
        mode = "thread_local" if distributed.is_initialized() else "global"
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a capture takes memory from a pool of its own and cannot free what others keep
        with one_capture, torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
            loss, table, reached = self._passes(batch | inputs)
        return _Graph(graph, inputs, (loss, table), reached)

    def average(self) -> None:
        """Give all processes the mean of their gradients, in one message for each type of number."""
        own = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        for dtype in {gradient.dtype for gradient in own}:
            gradients = [gradient for gradient in own if gradient.dtype == dtype]
            flat = cast(Tensor, reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean"))
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Everything goes through one stream that is not the default one, which a capture must not wait for.

    DistributedDataParallel holds the nodes that add to its parameters' gradients, and these keep the stream that they
    were made on.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _kind(batch: Batch) -> Hashable:
    """What decides which kernels a batch is computed by."""
    return tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in sorted(batch.items())
    )


@contextmanager
def maskless_attention(model: nn.Module) -> Iterator[None]:
    """Causal attention without masks, for batches that are padded on the right.

    While a CUDA graph is captured Transformers cannot look whether a mask is needed, and attention with one is slow.
    Backbones whose attention is not the usual one (windows, another implementation) keep their own.
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
    """Whether attention is PyTorch's, and sees the whole sequence in every layer."""
    return backbone.config._attn_implementation == "sdpa" and not attention_windows(backbone)


def check_no_dropout(model: nn.Module) -> None:
    """Raise `ValueError` for a model that draws random numbers in training: a CUDA graph could not draw the same again
    for the meta-gradient."""
    found = next((name for name, _ in parts_with_dropout(model)), None)
    if found is not None:
        raise ValueError(
            f"cuda_graphs=True trains without dropout, and {found!r} has some. Set it to 0 (lora_dropout=0.0 in the "
            "LoraConfig; attention_dropout=0.0, or as the backbone calls it, in from_pretrained), or leave cuda_graphs "
            "out."
        )
