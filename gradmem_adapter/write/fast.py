"""When WRITE is compiled and captured: faster passes with the same numbers."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from gradmem_adapter.utils.backbone import attention_windows, on_several_devices
from gradmem_adapter.utils.fingerprint import walk
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.cuda_graph import Bucket, FastPass, launch_bound
from gradmem_adapter.write.loop import RunPass
from gradmem_adapter.write.loss import Pass, Writer, write_pass
from gradmem_adapter.write.plan import Plan

COMPILE_SECONDS = 20.0
"""`compile="auto"` compiles once WRITE has taken this long, which is about as long as compiling takes. However much is
written, this takes at most twice the time of the best choice in hindsight."""


def unsuited(writer: Writer, context: Context, vectors: int) -> str | None:
    """Why a fast pass could give different numbers than the plain one, or `None`.

    Args:
        writer (`Writer`): the model.
        context (`Context`): the contexts to write.
        vectors (`int`): m, the vectors of their memory.
    """
    backbone = writer.backbone
    if backbone.training:
        return "the model is in training mode, where dropout differs in every pass; call model.eval()"
    if any("forward" in module.__dict__ for module in backbone.modules()):
        return "a module's forward has been replaced, as offloading and device maps do"
    if on_several_devices(backbone):
        return "the model is on several devices"
    places = writer.prefix_length(vectors) + context.input_ids.shape[1]
    if (window := min(attention_windows(backbone), default=places)) < places:
        return f"the contexts are longer than the model's attention window of {window:,} tokens"
    return None


class FastWrites:
    """The fast passes of one model: made when they pay off, and again when the model has changed.

    Fast passes run one at a time across all threads; plain passes need no lock. Copies (`copy`, `pickle`) start empty.
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
    def of(
        self, writer: Writer, context: Context, vectors: int, compile: bool | str
    ) -> Iterator[Callable[[Plan], RunPass]]:
        """Yields the function that chooses a pass for a plan, and measures the time that WRITE takes in the block.

        Args:
            writer (`Writer`): the model.
            context (`Context`): B contexts.
            vectors (`int`): m, the vectors of their memory.
            compile (`bool` or `"auto"`): as in `WriteOptions`.

        Raises:
            ValueError: with `compile=True`, the model cannot be compiled for these contexts.
        """

        def pass_of(plan: Plan) -> RunPass:
            plain = partial(write_pass, plan.of(writer))
            if compile is False:
                return plain
            return self._choose(writer, plan, context.split(plan.rows)[0], vectors, compile is True) or plain

        start = time.perf_counter()
        try:
            yield pass_of
        finally:
            self._seconds += time.perf_counter() - start

    def _choose(self, writer: Writer, plan: Plan, context: Context, vectors: int, demanded: bool) -> RunPass | None:
        cuda = context.input_ids.device.type == "cuda"
        if not (demanded or cuda):
            return None  # on a CPU compiling saves only a seventh of the time: not worth the wait unless asked for
        reason = unsuited(writer, context, vectors)
        with self._lock:
            key = signature(writer)
            if key != self._key:
                self._forget(key)
            reason = reason or self._plain_only
            if reason is not None:
                if demanded:
                    raise ValueError(f"compile=True is not possible: {reason}. Use compile='auto' or compile=False.")
                return None
            compiled = demanded or self._seconds > COMPILE_SECONDS
            bucket = Bucket.of(context, writer.longest_context(vectors))
            graphed = cuda and not plan.recomputed and launch_bound(writer.backbone, math.prod(bucket))
            again = bucket in self._seen
            self._seen.add(bucket)
            if not demanded and not (again if graphed else compiled):
                return None
            if self._fast is None or (compiled and not self._fast.compiled):
                self._fast = FastPass(writer, compiled=compiled, graphed=cuda)
            return partial(self._checked, self._fast, writer, plan, demanded)

    def _checked(
        self,
        fast: FastPass,
        writer: Writer,
        plan: Plan,
        demanded: bool,
        memory: Tensor,
        context: Context,
        gradient: bool,
        recovered: bool,
    ) -> Pass:
        """A fast pass. The first one is compared with the plain pass, which takes over if they differ or the fast one
        fails."""

        def plain() -> Pass:
            return write_pass(plan.of(writer), memory, context, gradient, recovered)

        with self._lock:
            if self._plain_only is not None:
                return plain()
            problem = ""
            try:
                found = fast(plan, memory, context, gradient, recovered)
            except torch.cuda.OutOfMemoryError:
                if not fast.graphs:
                    raise
                # handled below: the error's traceback keeps the tensors that did not fit
            except Exception as error:
                if demanded:
                    raise
                problem = f"it failed ({type(error).__name__}: {error})"
            else:
                if fast.trusted or not gradient:
                    return found
                expected = plain()
                if fast.agrees(found, expected):
                    return found
                problem = "its write gradients or losses differ from the plain ones"
            if not problem:
                fast.clear()
                return plain()
            self._plain_only, self._fast = f"a fast pass was tried, but {problem}", None
            if demanded:
                raise ValueError(f"compile=True is not possible: {self._plain_only}. Use compile=False.")
            warnings.warn(
                f"WRITE runs without compiling: {self._plain_only}. Set compile=False to skip this attempt.",
                stacklevel=7,
            )
            return plain()


def signature(writer: Writer) -> Any:
    """Identifies the model that a fast pass is made for: addresses of weights and settings of layers."""
    device = writer.slots.gradmem_memory[writer.adapter].device.type
    weights, layers = [], []
    for module in walk(writer.backbone):
        weights += [(p.data_ptr(), p.dtype) for p in module._parameters.values() if p is not None]
        if isinstance(module, BaseTunerLayer):
            scaling = str(getattr(module, "scaling", ""))
            layers.append((module.disable_adapters, tuple(module.active_adapters), scaling, module.merged))
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return writer.adapter, writer.config.write_head, autocast, weights, layers
