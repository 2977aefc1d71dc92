"""How calls that are being answered are counted."""

import sys
import threading

import pytest

from gradmem_adapter.answering.batching import Call, Options
from gradmem_adapter.answering.sampling import Sampling
from gradmem_adapter.serve import Limits
from gradmem_adapter.serve.errors import ApiError
from gradmem_adapter.serve.metrics import Metrics
from gradmem_adapter.serve.reads import Reads


@pytest.fixture
def reads(pipeline, monkeypatch):
    """Reads whose calls wait until a test ends them."""
    own = Reads(pipeline, None, Limits(reads=3000), Metrics())
    monkeypatch.setattr(own._batcher, "submit", lambda call, size: None)
    return own


@pytest.fixture
def often():
    """Threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_metrics_count_while_calls_come_and_go(reads, pipeline, often):
    calls = [Call(pipeline, [1], None, Options(1, Sampling(None, None), ()), None) for _ in range(3000)]
    counted, done = [], threading.Event()

    def count():
        while not done.is_set():
            try:
                counted.append(len(reads))
            except RuntimeError as error:
                counted.append(error)

    thread = threading.Thread(target=count)
    thread.start()
    for call in calls:
        reads._submit(call)
    done.set()
    thread.join()
    assert [one for one in counted if isinstance(one, Exception)] == []
    assert len(reads) == 3000
    with pytest.raises(ApiError, match="3,000 prompts"), reads.room(1):
        pass
    calls[0].tokens.set_result([1])
    calls[1].tokens.set_exception(ValueError("no"))
    assert len(reads) == 2998
    reads.close()
    assert all(call.cancelled.is_set() for call in calls[2:])
    assert len(reads) == 0
