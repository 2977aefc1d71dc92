"""Decoding into a static cache: all steps have the same shapes, so a whole step can be launched at once as a CUDA
graph."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from gradmem_adapter.read.prefix_cache import KeptPrefix
from gradmem_adapter.utils.backbone import device_of, on_several_devices, shallow_copy
from gradmem_adapter.utils.graphs import one_capture


def can_capture(backbone: PreTrainedModel) -> bool:
    """Whether every decoding step into a static cache runs the same kernels at the same addresses: nothing in it
    depends on tensor values or on counters in Python, as sliding windows do."""
    if backbone.training or getattr(backbone, "is_quantized", False) or not backbone._can_compile_fullgraph:
        return False
    if on_several_devices(backbone):
        return False
    layers = StaticCache(config=backbone.config.get_text_config(decoder=True), max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers)


def generate_statically(
    backbone: PreTrainedModel, input_ids: Tensor, length: int, kept: KeptPrefix | None, **options: Any
) -> Any:
    """Transformers' `generate` with `cache_implementation="static"` on a model that `can_capture`.

    Transformers would compile the model, which takes a minute per batch size and works in only one thread. Here a
    decoding step is captured as a CUDA graph instead.

    Args:
        backbone (`PreTrainedModel`): the causal LM; not changed.
        input_ids (`Tensor`): `[B, T]`.
        length (`int`): P, the length of the prefix.
        kept (`KeptPrefix`, *optional*): keeps the keys and values of the prefix.
        options: arguments of `generate`.
    """
    copied, caches = shallow_copy(backbone), list[StaticCache]()

    def prepare_static_cache(**arguments: Any) -> StaticCache:
        cache = cast(Any, type(copied))._prepare_static_cache(copied, **arguments)
        if kept is not None:
            kept.fill(cache, arguments["batch_size"])
            caches.append(cache)
        return cast(StaticCache, cache)

    copied.__dict__["_prepare_static_cache"] = prepare_static_cache
    steps = CapturedSteps(copied)
    if device_of(backbone).type == "cuda":
        copied.__dict__["get_compiled_call"] = lambda config: steps
    try:
        output = cast(Any, copied).generate(input_ids, **options)
    finally:
        steps.end()
    if kept is not None and caches:
        kept.keep_first(caches[0], length)
    return output


_over: defaultdict[torch.device, list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]]] = defaultdict(list)
"""Finished graphs with their streams, by device. A new graph reuses the memory of a finished one, so the total is
bounded by the largest number of graphs in use at the same time."""


class CapturedSteps:
    """The decoding steps of one `generate`. The first step runs normally and initialises its kernels. The second is
    captured; it and all later ones are launched as a graph.

    The next step overwrites the output of a step.

    Args:
        forward (`Callable`): a step; arguments that are not tensors must not change.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self._shapes: list[torch.Size] | None = None
        self._inputs: list[Tensor] = []
        self._output: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    def __call__(self, **inputs: Any) -> Any:
        tensors: list[Tensor] = []
        _each(inputs, tensors.append)
        shapes = [tensor.shape for tensor in tensors]
        if self._failed or shapes != self._shapes:
            self.end()
            self._shapes = shapes
            return self.forward(**inputs)
        if self._graph is None:
            try:
                self._capture(inputs, tensors[0].device)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(
                    f"Decoding continues without a CUDA graph, because a step could not be captured ({error}).",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self.forward(**inputs)
        for own, new in zip(self._inputs, tensors, strict=True):
            own.copy_(new)
        cast(torch.cuda.CUDAGraph, self._graph).replay()
        return self._output

    def _capture(self, inputs: dict[str, Any], device: torch.device) -> None:
        own: list[Tensor] = []

        def kept(tensor: Tensor) -> Tensor:
            own.append(tensor.clone())
            return own[-1]

        inputs, graph = _each(inputs, kept), torch.cuda.CUDAGraph()
        try:
            stream, before = _over[device].pop()
            pool = before.pool()
        except IndexError:
            stream, pool = torch.cuda.Stream(device), None
        with one_capture, torch.cuda.device(device), torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may continue
            try:
                output = self.forward(**inputs)
            finally:
                graph.capture_end()
        self._inputs, self._output, self._stream, self._graph = own, output, stream, graph

    def end(self) -> None:
        """No more steps will follow, so their memory can be reused."""
        if self._stream is not None and self._graph is not None:
            _over[self._stream.device].append((self._stream, self._graph))
        self._inputs, self._output, self._stream, self._graph = [], None, None, None


def _each(inputs: dict[str, Any], function: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Apply a function to the tensors in arguments, also to those in dicts (masks by kind of layer)."""
    return {
        name: function(value) if isinstance(value, Tensor) else _each(value, function) if type(value) is dict else value
        for name, value in inputs.items()
    }
