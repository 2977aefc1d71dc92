"""A write pass on a frozen, compiled twin of the model, launched as one CUDA graph per bucket of shapes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.lora import PhaseGated, in_phase
from gradmem_adapter.ops.attention import CAUSAL
from gradmem_adapter.ops.cross_entropy import FUSED, FusedCrossEntropy
from gradmem_adapter.utils.capture import static_shapes
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loop import write_pass
from gradmem_adapter.write.loss import Writer

MAX_GRAPHS = 16
"""How many buckets have a CUDA graph; the one used longest ago makes room."""


class Bucket(NamedTuple):
    """The shape that a batch of contexts is padded to: at most an eighth more than it has, or 63 tokens."""

    batch: int
    length: int

    @classmethod
    def of(cls, context: Context, longest: int | None) -> Bucket:
        """Args: longest: how many tokens a context may have at all."""
        batch, length = context.input_ids.shape
        length = _round_up(length, max(64, _power_above(length) // 16))
        return cls(
            _round_up(batch, max(1, _power_above(batch) // 16)), length if longest is None else min(length, longest)
        )

    def pad(self, memory: Tensor, context: Context) -> tuple[Tensor, Context]:
        """With copies of the first sample and tokens that do not count."""
        rows = torch.arange(self.batch, device=memory.device)
        rows = rows.where(rows < len(memory), 0)
        width = self.length - context.input_ids.shape[1]
        ids = nn.functional.pad(context.input_ids, (0, width))
        return memory[rows], Context(ids[rows], context.lengths[rows])


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class FastPass:
    """`write_pass` on a twin of the model: without gradients for weights, compiled, one CUDA graph per bucket."""

    def __init__(self, writer: Writer, *, compiled: bool, graphed: bool) -> None:
        backbone = frozen_twin(writer.backbone)
        if compiled:
            for layer in backbone.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(dynamic=True)
        self.writer = replace(writer, backbone=backbone, fused=FusedCrossEntropy.compiled() if compiled else FUSED)
        self.compiled, self.graphed, self.trusted = compiled, graphed, False
        self._graphs: OrderedDict[tuple[Bucket, bool, bool], Callable[..., Any]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if graphed else None

    def __call__(
        self, bucket: Bucket, memory: Tensor, context: Context, gradient: bool, recovered: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if not self.graphed:
            return write_pass(self.writer, memory, context, gradient, recovered)
        padded = bucket.pad(memory, context)
        key = bucket, gradient, recovered
        if key not in self._graphs:
            while len(self._graphs) >= 2 * MAX_GRAPHS:  # with and without a gradient
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(*padded, gradient, recovered)
        self._graphs.move_to_end(key)
        slope, losses, share = self._graphs[key](*padded)

        def own(part: Tensor | None) -> Tensor | None:
            """Without the bucket's other rows, and not where the graph writes next time."""
            return None if part is None else part[: len(memory)].clone()

        return own(slope), losses[: len(memory)].clone(), own(share)

    def clear(self) -> None:
        """Give the memory of all graphs back."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.graphed else None
        torch.cuda.empty_cache()

    def agrees(self, result: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
        """Whether a fast pass is the plain one, up to what its precision costs: write gradients and losses."""
        error = torch.linalg.vector_norm(result[0] - expected[0]) / torch.linalg.vector_norm(expected[0])
        exact = self.writer.backbone.dtype.itemsize >= 4 and not torch.is_autocast_enabled(expected[0].device.type)
        # At untrained slots gradients in bf16 are apart by a tenth to a quarter and losses by a thousandth: it is the
        # losses that tell rounding from a pass of something else (docs/performance.md).
        gradients, losses = (1e-3, 1e-3) if exact else (0.5, 1e-2)
        same = bool(error <= gradients) and torch.allclose(result[1], expected[1], rtol=losses, atol=losses)
        self.trusted = same or not expected[0].isfinite().all()
        return self.trusted

    def _capture(self, memory: Tensor, context: Context, gradient: bool, recovered: bool) -> Callable[..., Any]:
        """A function that copies its arguments to where the graph reads them, and launches it."""
        memory, context = memory.clone(), Context(*(part.clone() for part in context))
        stream, graph = torch.cuda.Stream(memory.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with static_shapes():
            with torch.cuda.stream(stream):  # once as it is: compiles, and sets up the libraries
                write_pass(self.writer, memory, context, gradient, recovered)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize(memory.device)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = write_pass(self.writer, memory, context, gradient, recovered)
        used = torch.cuda.Event()

        def launch(new_memory: Tensor, new_context: Context) -> tuple[Tensor | None, Tensor, Tensor | None]:
            used.wait()  # another thread's stream may still read
            memory.copy_(new_memory)
            for part, new in zip(context, new_context, strict=True):
                part.copy_(new)
            graph.replay()
            used.record()
            return result

        return launch


def frozen_twin(backbone: PreTrainedModel) -> PreTrainedModel:
    """The same weights in other modules, which can be compiled and configured without a change of the model itself.

    Nothing in it requires a gradient, and its attention is causal without a mask.
    """
    configs: dict[int, PreTrainedConfig] = {}

    def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            configs[id(config)]._attn_implementation = CAUSAL
        return configs[id(config)]

    def twin(module: nn.Module) -> nn.Module:
        if isinstance(module, MemorySlots):
            return module
        if isinstance(module, PhaseGated):
            module = in_phase(module, "write")
        result = copy.copy(module)
        result.__dict__["_parameters"] = {
            name: None if value is None else nn.Parameter(value.detach(), requires_grad=False)
            for name, value in module._parameters.items()
        }
        result.__dict__["_modules"] = {
            name: None if child is None else twin(child) for name, child in module._modules.items()
        }
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                result.__dict__[name] = own_config(value)
        return result

    return twin(backbone)  # type: ignore[return-value]
