"""CUDA graphs in one memory pool, which is bounded and can be freed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

SHARE = 0.25
"""The share of a GPU's free memory that the graphs of one model may hold."""
MAX_GRAPHS = 32
"""The most graphs in a pool; the least recently used one is dropped for a new one."""

one_capture = threading.Lock()
"""PyTorch allows one capture at a time per process, because captures share the random state. Other threads may compute
meanwhile, but must not draw random numbers on the GPU."""

Graph = TypeVar("Graph")


class GraphPool(Generic[Graph]):
    """Graphs by the key that they were captured for.

    Graphs that are launched one after another share their memory, so a pool takes about as much as its largest graph,
    or more if small graphs were captured first. The memory is freed only when all graphs of the pool are gone. When the
    pool exceeds its bound, all graphs are therefore dropped, and those that are used again are captured again, which
    takes less memory because a large one now comes first.

    Args:
        device (`torch.device`): a GPU.
        share (`float`, *optional*, defaults to `SHARE`): the share of its free memory that bounds the pool.
    """

    def __init__(self, device: torch.device, share: float = SHARE) -> None:
        self.device, self.share, self.held = device, share, 0
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._too_large: set[Hashable] = set()
        self._handle: Any = None
        _pools.add(self)

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Hashable, capture: Callable[[Any], Graph]) -> Graph | None:
        """The graph for a key, or `None` if it alone would exceed the bound.

        Args:
            key (`Hashable`): what the graph is for.
            capture (`Callable`): captures the graph; gets the handle of the pool to use.
        """
        if key in self._too_large:
            return None
        if key not in self._graphs:
            self._add(key, capture)
            if self.held > self._bound() and len(self) > 1:
                self.clear()
                self._add(key, capture)
            if self.held > self._bound():
                self.clear()
                self._too_large.add(key)
                return None
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def clear(self) -> None:
        """Free the memory of all graphs."""
        if self._graphs:
            torch.cuda.synchronize(self.device)
            self._graphs.clear()
            torch.cuda.empty_cache()
        self._handle, self.held = None, 0

    def _add(self, key: Hashable, capture: Callable[[Any], Graph]) -> None:
        while len(self) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        try:
            self._graphs[key] = capture(self._handle)
        finally:
            self.held = self._measure()

    def _measure(self) -> int:
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == self.device.index and tuple(segment["segment_pool_id"]) == tuple(self._handle)
        )

    def _bound(self) -> float:
        return self.share * (free_on_gpu(self.device) + self.held)


_pools: WeakSet[GraphPool[Any]] = WeakSet()


def held_by_graphs(device: torch.device) -> int:
    """Bytes that graphs hold on a GPU; nothing else can use them, even if parts are free."""
    return sum(pool.held for pool in _pools if pool.device == device)


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch can still allocate: free memory within the limit of the process
    (`torch.cuda.set_per_process_memory_fraction`), plus unused memory in PyTorch's cache."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, limit)) + max(0, reserved - allocated - held_by_graphs(device))
