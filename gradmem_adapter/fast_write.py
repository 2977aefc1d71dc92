"""Write passes that are compiled, and launched as one: the same numbers as `write_pass`, sooner.

A GPU computes a layer of a small model in less time than Python needs to launch its kernels. A CUDA graph launches all
kernels of a pass at once, and compiled layers have fewer of them. Both are made for a *bucket* of shapes, to which
contexts are padded.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import CAUSAL
from .checks import static_shapes
from .fingerprint import walk
from .lora_phase import PhaseGated, in_phase
from .slots import MemorySlots
from .token_losses import PLAIN, Once
from .write import Context, WritePass, Writer, write_pass

COMPILE_SECONDS = 20.0
"""`compile="auto"` compiles once WRITE has taken this long, about as long as compiling takes: however much is written
after it, that takes at most twice the time of whoever had known beforehand."""
MAX_GRAPHS = 16
"""How many buckets have a CUDA graph; the one used longest ago makes room."""
SPARE_MEMORY = 0.25
"""The share of a GPU's memory that bulk WRITE leaves to what follows it, if its graphs hold more than the rest."""


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


def unsuited(writer: Writer, context: Context) -> str | None:
    """Why a fast pass could give other numbers than the plain one for this model and these contexts, or None."""
    backbone = writer.backbone
    if backbone.training:
        return "the model is in training mode, where dropout draws anew in every pass; call model.eval()"
    if any("forward" in module.__dict__ for module in backbone.modules()):
        return "a module's forward has been replaced (offloading and device maps do that)"
    if len({parameter.device for parameter in backbone.parameters()}) > 1:
        return "the model is on several devices"
    config = backbone.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    places = context.input_ids.shape[1] + writer.prefix_length
    if any(window is not None and window < places for window in windows):
        return f"the contexts are longer than the model's attention window ({windows})"
    return None


class FastWrites:
    """The fast passes of one model: made when they pay, and again when the model has changed.

    Passes are run one at a time, by whatever thread; the plain one needs no such order. Copies (`copy`, `pickle`) start
    anew.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._forget(None)

    def __reduce__(self) -> tuple[type[FastWrites], tuple[()]]:
        return FastWrites, ()

    def _forget(self, key: Any) -> None:
        self._key = key
        self._seconds = 0.0
        self._seen: set[Bucket] = set()
        self._plain_only: str | None = None
        self._fast: FastPass | None = None

    @contextmanager
    def of(self, writer: Writer, context: Context, compile: bool | str, longest: int | None) -> Iterator[WritePass]:
        """The pass to use for a batch of contexts, and, after it, the time that it took.

        Raises:
            ValueError: `compile=True`, and the model cannot be compiled for these contexts.
        """
        plain = partial(write_pass, writer)
        start = time.perf_counter()
        try:
            yield plain if compile is False else self._choose(writer, context, compile is True, longest) or plain
        finally:
            self._seconds += time.perf_counter() - start

    def make_room(self, device: torch.device) -> None:
        """Give the memory of all graphs back where they leave little of it: READ needs some, and cannot take theirs."""
        with self._lock:
            if self._fast is None or not self._fast.graphed:
                return
            free, total = torch.cuda.mem_get_info(device)
            # And what PyTorch keeps for anybody: blocks of a graph's pool are for that graph alone.
            free += sum(
                segment["total_size"] - segment["allocated_size"]
                for segment in torch.cuda.memory_snapshot()
                if segment["device"] == device.index and tuple(segment["segment_pool_id"]) == (0, 0)
            )
            if free < SPARE_MEMORY * total:
                self._fast.clear()

    def _choose(self, writer: Writer, context: Context, now: bool, longest: int | None) -> WritePass | None:
        cuda = context.input_ids.device.type == "cuda"
        if not (now or cuda):
            return None  # on a CPU compiling saves a seventh of the time: not worth the stall unless asked for
        reason = unsuited(writer, context)
        with self._lock:
            key = signature(writer)
            if key != self._key:
                self._forget(key)
            reason = reason or self._plain_only
            if reason is not None:
                if now:
                    raise ValueError(f"compile=True cannot be had: {reason}. Use compile='auto' or compile=False.")
                return None
            bucket = Bucket.of(context, longest)
            if not now and bucket not in self._seen:
                self._seen.add(bucket)
                return None
            compiled = now or self._seconds > COMPILE_SECONDS
            if self._fast is None or (compiled and not self._fast.compiled):
                self._fast = FastPass(writer, compiled=compiled, graphed=cuda)
            return partial(self._checked, self._fast, writer, bucket, now)

    def _checked(
        self,
        fast: FastPass,
        writer: Writer,
        bucket: Bucket,
        now: bool,
        memory: Tensor,
        context: Context,
        gradient: bool,
        first: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """A fast pass; the first one is compared with the plain one, which takes over where something is amiss."""
        with self._lock:
            if self._plain_only is not None:
                return write_pass(writer, memory, context, gradient, first)
            problem = ""
            try:
                result = fast(bucket, memory, context, gradient, first)
            except torch.cuda.OutOfMemoryError:
                pass  # dealt with below: until the error is gone, its traceback holds what did not fit
            except Exception as error:
                if now:
                    raise
                problem = f"it failed ({type(error).__name__}: {error})"
            else:
                if fast.trusted or not gradient:
                    return result
                expected = write_pass(writer, memory, context, gradient, first)
                if fast.agrees(result, expected):
                    return result
                problem = "its write gradients or losses differ from the plain ones"
            if not problem:
                fast.clear()
                return write_pass(writer, memory, context, gradient, first)
            self._plain_only, self._fast = f"a fast pass was tried, and {problem}", None
            if now:
                raise ValueError(f"compile=True cannot be had: {self._plain_only}. Use compile=False.")
            warnings.warn(f"WRITE stays plain: {self._plain_only}. compile=False spares the try.", stacklevel=6)
            return write_pass(writer, memory, context, gradient, first)


class FastPass:
    """`write_pass` on a twin of the model: without gradients for weights, compiled, one CUDA graph per bucket."""

    def __init__(self, writer: Writer, *, compiled: bool, graphed: bool) -> None:
        backbone = frozen_twin(writer.backbone)
        if compiled:
            for layer in backbone.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(dynamic=True)
        self.writer = replace(writer, backbone=backbone, once=Once.compiled() if compiled else PLAIN)
        self.compiled, self.graphed, self.trusted = compiled, graphed, False
        self._graphs: OrderedDict[tuple[Bucket, bool, bool], Callable[..., Any]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if graphed else None

    def __call__(
        self, bucket: Bucket, memory: Tensor, context: Context, gradient: bool, first: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if not self.graphed:
            return write_pass(self.writer, memory, context, gradient, first)
        padded = bucket.pad(memory, context)
        key = bucket, gradient, first
        if key not in self._graphs:
            while len(self._graphs) >= 2 * MAX_GRAPHS:  # with and without a gradient
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(*padded, gradient, first)
        self._graphs.move_to_end(key)
        slope, losses, recovered = self._graphs[key](*padded)

        def own(part: Tensor | None) -> Tensor | None:
            """Without the bucket's other rows, and not where the graph writes next time."""
            return None if part is None else part[: len(memory)].clone()

        return own(slope), losses[: len(memory)].clone(), own(recovered)

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

    def _capture(self, memory: Tensor, context: Context, gradient: bool, first: bool) -> Callable[..., Any]:
        """A function that copies its arguments to where the graph reads them, and launches it."""
        memory, context = memory.clone(), Context(*(part.clone() for part in context))
        stream, graph = torch.cuda.Stream(memory.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with static_shapes():
            with torch.cuda.stream(stream):  # once as it is: compiles, and sets up the libraries
                write_pass(self.writer, memory, context, gradient, first)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize(memory.device)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = write_pass(self.writer, memory, context, gradient, first)
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


def signature(writer: Writer) -> Any:
    """What a fast pass was made for: it holds addresses of weights and what the layers were set to."""
    device = writer.slots.gradmem_memory[writer.adapter].device.type
    weights, layers = [], []
    for module in walk(writer.backbone):
        weights += [(p.data_ptr(), p.dtype) for p in module._parameters.values() if p is not None]
        if isinstance(module, BaseTunerLayer):
            scaling = str(getattr(module, "scaling", ""))
            layers.append((module.disable_adapters, tuple(module.active_adapters), scaling, module.merged))
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return writer.adapter, writer.config.write_head, autocast, weights, layers
