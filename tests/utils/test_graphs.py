"""The memory of CUDA graphs, on a simulated GPU; tests/test_cuda.py uses a real one."""

import gc
from itertools import count

import pytest
import torch

from gradmem_adapter.utils import graphs, hardware
from gradmem_adapter.utils.graphs import GraphPool, held_by_graphs

TOTAL = 1000
DEVICE = torch.device("cuda", 0)


class Graph:
    pass


class GPU:
    """Pools of memory as PyTorch has them: a capture takes a free piece that is large enough, or a new one, and none
    comes back as long as a graph of the pool is there and the cache is not emptied."""

    def __init__(self):
        self.pieces, self.graphs, self.captured, self.fraction, self.cached = {}, {}, [], 1.0, 0
        self.handles = count(1)

    def pool(self):
        handle = (next(self.handles), 0)
        self.pieces[handle], self.graphs[handle] = [], []
        return handle

    def capture(self, size):
        def capture(handle):
            self.captured.append(size)
            if size > TOTAL:
                raise torch.cuda.OutOfMemoryError
            if not any(piece >= size for piece in self.pieces[handle]):
                self.pieces[handle].append(size)
            graph = Graph()
            self.graphs[handle].append(graph)
            return graph

        return capture

    def held(self):
        return sum(map(sum, self.pieces.values()))

    def empty_cache(self):
        for handle, found in self.graphs.items():
            found[:] = [graph for graph in found if len(gc.get_referrers(graph)) > 1]
            if not found:
                self.pieces[handle].clear()
        self.cached = 0

    def snapshot(self):
        own = [{"device": 0, "total_size": self.cached, "segment_pool_id": (0, 0)}]
        return own + [
            {"device": 0, "total_size": size, "segment_pool_id": handle}
            for handle, sizes in self.pieces.items()
            for size in sizes
        ]


@pytest.fixture
def gpu(monkeypatch):
    gpu = GPU()
    fakes = {
        "graph_pool_handle": gpu.pool,
        "memory_snapshot": gpu.snapshot,
        "empty_cache": gpu.empty_cache,
        "synchronize": lambda device: None,
        "mem_get_info": lambda device: (TOTAL - gpu.held() - gpu.cached, TOTAL),
        "memory_reserved": lambda device: gpu.held() + gpu.cached,
        "memory_allocated": lambda device: 0,
        "get_per_process_memory_fraction": lambda device: gpu.fraction,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpu


@pytest.mark.parametrize("sizes", [range(10, 160, 5), range(160, 10, -5), [10, 150] * 15])
def test_thirty_shapes_stay_within_the_memory_limit(gpu, sizes):
    pool = GraphPool(DEVICE, share=0.2)
    for _ in range(3):
        for size in sizes:
            assert pool.get(size, gpu.capture(size)) is pool.get(size, gpu.capture(size))
            assert gpu.held() == pool.held == held_by_graphs(DEVICE) <= 0.2 * TOTAL
    # A shape that comes up again is not captured every time.
    assert len(gpu.captured) <= 3 * len(set(sizes))


def test_a_shape_too_large_by_itself_has_no_graph_and_holds_nothing(gpu):
    pool = GraphPool(DEVICE, share=0.2)
    for _ in range(3):
        assert pool.get("large", gpu.capture(300)) is None
    assert gpu.captured == [300]
    assert gpu.held() == 0
    assert pool.get("small", gpu.capture(20)) is not None


def test_a_failed_capture_leaves_the_other_graphs(gpu):
    pool = GraphPool(DEVICE)
    first = pool.get(10, gpu.capture(10))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pool.get(2 * TOTAL, gpu.capture(2 * TOTAL))
    assert pool.get(10, gpu.capture(10)) is first
    assert len(pool) == 1


def test_the_least_recently_used_graph_makes_room(gpu, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    pool = GraphPool(DEVICE)
    for size in (1, 2, 3, 1, 4, 1, 2):
        pool.get(size, gpu.capture(size))
    assert gpu.captured == [1, 2, 3, 4, 2]


def test_clearing_the_pool_frees_its_memory(gpu):
    pool = GraphPool(DEVICE)
    pool.get(100, gpu.capture(100))
    pool.clear()
    assert gpu.held() == pool.held == len(pool) == 0
    assert pool.get(100, gpu.capture(100)) is not None


def test_free_memory_includes_what_pytorch_caches(gpu):
    gpu.cached = 300
    assert graphs.free_on_gpu(DEVICE) == TOTAL
    pool = GraphPool(DEVICE)
    pool.get(100, gpu.capture(100))
    assert graphs.free_on_gpu(DEVICE) == TOTAL - 100
    gpu.fraction = 0.5
    assert graphs.free_on_gpu(DEVICE) == 400
    assert hardware.free_memory(DEVICE) == pytest.approx(hardware.MARGIN * 400)
