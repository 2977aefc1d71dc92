"""A write pass on a frozen, compiled twin of the model, launched as one CUDA graph per bucket of shapes if kernel
launches take most of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.ops.cross_entropy import FUSED, FusedCrossEntropy
from gradmem_adapter.utils.backbone import decoder_layers, layers_of
from gradmem_adapter.utils.capture import static_shapes
from gradmem_adapter.utils.graphs import GraphPool, one_capture
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Pass, Writer, write_pass
from gradmem_adapter.write.plan import Plan
from gradmem_adapter.write.twin import frozen_twin

LAUNCH_BOUND = 1e11
"""Weights per layer times tokens. Above it, computing takes longer than launching: about a millisecond per layer."""


def launch_bound(backbone: PreTrainedModel, tokens: int) -> bool:
    """Whether the GPU computes a pass of this many tokens faster than Python launches its kernels."""
    layers = decoder_layers(backbone)
    return bool(layers) and sum(p.numel() for p in layers[0].parameters()) * tokens < LAUNCH_BOUND


class Bucket(NamedTuple):
    """The shape that a batch of contexts is padded to: at most an eighth or 63 tokens larger than the batch.

    Args:
        batch (`int`): B.
        length (`int`): N, the number of tokens.
    """

    batch: int
    length: int

    @classmethod
    def of(cls, context: Context, longest: int | None) -> Bucket:
        """The bucket of contexts, none of which may have more than `longest` tokens."""
        batch, length = context.input_ids.shape
        length = _round_up(length, max(64, _power_above(length) // 16))
        return cls(
            _round_up(batch, max(1, _power_above(batch) // 16)), length if longest is None else min(length, longest)
        )

    def pad(self, memory: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Pad a memory `[B, m, d]` and contexts with copies of the first sample and with tokens that do not count."""
        rows = torch.arange(self.batch, device=memory.device)
        rows = rows.where(rows < len(memory), 0)
        width = self.length - context.input_ids.shape[1]
        ids = torch.cat([context.input_ids, context.input_ids[:, :1].expand(-1, width)], dim=1)
        return memory[rows], Context(ids[rows], context.lengths[rows])


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class FastPass:
    """`write_pass` on a twin of the model, whose weights need no gradients.

    Args:
        writer (`Writer`): the model.
        compiled (`bool`): compile the layers of the twin.
        graphed (`bool`): launch passes as CUDA graphs, one per bucket, if launching takes most of the time.
    """

    def __init__(self, writer: Writer, *, compiled: bool, graphed: bool) -> None:
        backbone = frozen_twin(writer.backbone)
        if compiled:
            for layer in layers_of(backbone):
                layer.compile(dynamic=True)
        self.writer = replace(writer, backbone=backbone, fused=FusedCrossEntropy.compiled() if compiled else FUSED)
        self.compiled, self.trusted = compiled, False
        device = writer.slots.gradmem_memory[writer.adapter].device
        self.graphs: GraphPool[Callable[[Tensor, Context, int], Pass]] | None = GraphPool(device) if graphed else None

    def __call__(self, plan: Plan, memory: Tensor, context: Context, gradient: bool, recovered: bool) -> Pass:
        vectors = memory.shape[1]
        bucket = Bucket.of(context, self.writer.longest_context(vectors))
        if self.graphs is not None and plan.recomputed == 0 and launch_bound(self.writer.backbone, math.prod(bucket)):
            padded = bucket.pad(memory, context)
            wanted = gradient, recovered
            launch = self.graphs.get((bucket, vectors, wanted), lambda pool: self._capture(pool, *padded, *wanted))
            if launch is not None:
                return launch(*padded, len(memory))
        return write_pass(plan.of(self.writer), memory, context, gradient, recovered)

    @staticmethod
    def _own(found: Pass, rows: int) -> Pass:
        """Remove the rows that pad the bucket, and copy the rest, which the next launch would overwrite."""
        return Pass._make(None if part is None else part[:rows].clone() for part in found)

    def clear(self) -> None:
        """Free the memory of all graphs."""
        if self.graphs is not None:
            self.graphs.clear()

    def agrees(self, found: Pass, expected: Pass) -> bool:
        """Whether a fast pass with its gradient equals the plain one up to rounding."""
        gradient, right = cast(Tensor, found.gradient), cast(Tensor, expected.gradient)
        error = torch.linalg.vector_norm(gradient - right) / torch.linalg.vector_norm(right)
        exact = self.writer.backbone.dtype.itemsize >= 4 and not torch.is_autocast_enabled(right.device.type)
        # With untrained slots, gradients in bf16 differ by a tenth to a quarter and losses by a thousandth, so it is
        # the losses that distinguish rounding from a wrong pass (docs/lab/LOG.md).
        of_gradient, of_loss = (1e-3, 1e-3) if exact else (0.5, 1e-2)
        same = bool(error <= of_gradient) and torch.allclose(found.losses, expected.losses, rtol=of_loss, atol=of_loss)
        self.trusted = same or not right.isfinite().all()
        return self.trusted

    def _capture(
        self, pool: Any, memory: Tensor, context: Context, gradient: bool, recovered: bool
    ) -> Callable[[Tensor, Context, int], Pass]:
        """Capture a pass; returns a function that copies a memory and contexts to the graph's inputs, launches the
        graph and copies the first rows of its outputs."""
        memory, context = memory.clone(), Context(*(part.clone() for part in context))
        device = memory.device  # need not be the current one
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with static_shapes():
            with torch.cuda.stream(stream):  # a first run without capture compiles layers and initialises libraries
                write_pass(self.writer, memory, context, gradient, recovered)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            with one_capture, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = write_pass(self.writer, memory, context, gradient, recovered)
        used = torch.cuda.Event()

        def launch(new_memory: Tensor, new_context: Context, rows: int) -> Pass:
            here = torch.cuda.current_stream(device)
            here.wait_event(used)  # another thread's stream may still use the graph's inputs and outputs
            memory.copy_(new_memory)
            for part, new in zip(context, new_context, strict=True):
                part.copy_(new)
            graph.replay()
            found = self._own(result, rows)
            here.record_event(used)
            return found

        return launch
