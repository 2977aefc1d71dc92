"""Concurrent calls: batches, seeds and cancellation."""

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from langchain_gradmem import ChatGradMem, MemoryStateStore, attach
from tiny_pipeline import tiny_pipeline

from gradmem_adapter.answering.batching import Call
from gradmem_adapter.answering.sampling import Sampling

SAMPLING = {"temperature": 2.0, "top_p": 0.9, "max_tokens": 6}


@pytest.fixture
def chat(pipeline):
    return ChatGradMem(pipeline=pipeline, store=MemoryStateStore(), max_tokens=6)


@pytest.fixture
def sizes(pipeline, monkeypatch):
    """The sizes of the batches that go through the model."""
    found = []
    generate = pipeline.generate_ids

    def count(*args, **kwargs):
        found.append(len(args[0]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(pipeline, "generate_ids", count)
    return found


class TestBatches:
    async def test_fifty_requests_over_ten_documents_are_batched(self, chat, pipeline, sizes):
        references = chat.store.write(pipeline, [f"w{i} w{i + 1} w{i + 2}" for i in range(10)])
        inputs = [[attach(HumanMessage(f"w{i}"), [references[i % 10]])] for i in range(50)]
        expected = [chat.invoke(value).content for value in inputs]
        assert sizes == [1] * 50
        sizes.clear()
        answers = await asyncio.gather(*(chat.ainvoke(value) for value in inputs))
        assert [answer.content for answer in answers] == expected
        assert sum(sizes) == 50
        assert max(sizes) <= chat.max_batch
        assert len(sizes) < 25

    def test_max_concurrency_limits_a_batch(self, chat, sizes):
        chat.batch([f"w{i}" for i in range(6)], {"max_concurrency": 2})
        assert sum(sizes) == 6
        assert max(sizes) <= 2

    def test_cached_answers_are_used(self, pipeline, sizes):
        chat = ChatGradMem(pipeline=pipeline, cache=InMemoryCache(), max_tokens=3)
        first = chat.batch(["w1", "w2"])
        sizes.clear()
        assert [m.content for m in chat.batch(["w1", "w2", "w1"])] == [first[i].content for i in (0, 1, 0)]
        assert not sizes

    def test_a_failed_call_does_not_affect_the_others(self, chat, pipeline, monkeypatch):
        generate = pipeline.generate_ids
        monkeypatch.setattr(
            pipeline, "generate_ids", lambda ids, mask, **k: _fail_for(8, ids) or generate(ids, mask, **k)
        )
        expected = chat.invoke("w1").content
        bad = pipeline.tokenizer.decode([8])
        first, broken, last = chat.batch(["w1", bad, "w1"], return_exceptions=True)
        assert (first.content, last.content) == (expected, expected)
        assert "out of memory" in str(broken)

    def test_calls_work_again_after_a_thread_failed_to_start(self, chat, monkeypatch):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                chat.invoke("w1")
        assert chat.batch(["w1"])[0].usage_metadata["output_tokens"] == 6

    def test_waiting_calls_get_the_error_that_ends_the_thread(self, chat, monkeypatch):
        def fail(call):
            raise MemoryError("no batch")

        with monkeypatch.context() as patch:
            patch.setattr(Call, "kind", property(fail))
            for answer in chat.batch(["w1", "w2"], return_exceptions=True):
                assert isinstance(answer, MemoryError)
        assert chat.invoke("w1").usage_metadata["output_tokens"] == 6


def _fail_for(token, ids):
    if (ids == token).any():
        raise RuntimeError("out of memory")


class TestSeeds:
    def test_a_batch_draws_the_same_as_single_calls(self, chat):
        seeded = chat.model_copy(update={"seed": 3})
        inputs = ["w1", "w2 w3", "w4"]
        assert [m.content for m in seeded.batch(inputs, **SAMPLING)] == [
            seeded.invoke(value, **SAMPLING).content for value in inputs
        ]

    def test_without_a_seed_each_call_draws_differently(self, chat):
        assert len({m.content for m in chat.batch(["w1"] * 4, **SAMPLING)}) > 1

    def test_an_unfinished_stream_does_not_block_other_calls(self, chat):
        seeded = chat.model_copy(update={"seed": 0})
        stream = seeded.stream("w1", **SAMPLING)
        begun = next(stream)
        assert seeded.invoke("w1", **SAMPLING).content == begun.content + "".join(c.content for c in stream)

    def test_streams_share_a_batch(self, chat, sizes):
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda i: "".join(c.content for c in chat.stream(f"w{i}")), range(4)))
        assert max(sizes) > 1
        assert answers == [chat.invoke(f"w{i}").content for i in range(4)]

    def test_a_stream_goes_on_with_the_same_draws_after_its_batch_failed(self, chat, pipeline, monkeypatch):
        """Each call of the batch is then answered alone, from the beginning."""
        generate, alone = pipeline.generate_ids, []

        def fail_late(ids, mask, **options):
            if len(ids) > 1:
                generate(ids, mask, **(options | {"max_new_tokens": 3}))
                raise RuntimeError("out of memory")
            alone.append(generate(ids, mask, **options)[0, ids.shape[1] :])
            return alone[-1]

        monkeypatch.setattr(pipeline, "generate_ids", fail_late)
        with ThreadPoolExecutor(3) as threads:
            shown = threads.map(lambda i: "".join(c.content for c in chat.stream(f"w{i}", **SAMPLING)), range(3))
        assert sorted(shown) == sorted(pipeline.tokenizer.batch_decode(alone, skip_special_tokens=True))

    async def test_many_streams_can_run_at_once(self, chat):
        seeded = chat.model_copy(update={"seed": 0})

        async def read(i):
            return "".join([chunk.content async for chunk in seeded.astream(f"w{i}", **SAMPLING)])

        answers = await asyncio.wait_for(asyncio.gather(*map(read, range(40))), 300)
        assert answers[7] == seeded.invoke("w7", **SAMPLING).content

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.5, None), (1.0, 0.6)])
    def test_draws_follow_the_distribution(self, temperature, top_p):
        logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        rows = 4000
        processors = Sampling(temperature, top_p).processors(range(rows), torch.device("cpu"))
        drawn = processors(torch.zeros(rows, 1, dtype=torch.long), logits.repeat(rows, 1)).argmax(-1)
        expected = (logits / temperature).softmax(-1)[0]
        if top_p is not None:
            expected = torch.tensor([1.0, 0, 0, 0])  # the first alone has 0.64
        found = torch.tensor([Counter(drawn.tolist())[i] / rows for i in range(4)])
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


class TestCancelled:
    """A call that nobody waits for ends with its next token."""

    @pytest.fixture
    def passes(self):
        pipeline = tiny_pipeline()
        count = []

        def slow(*args):
            count.append(1)
            time.sleep(0.002)

        pipeline.model.get_base_model().register_forward_hook(slow)
        self.chat = ChatGradMem(pipeline=pipeline, max_tokens=140)
        return count

    @pytest.mark.parametrize("way", ["ainvoke", "astream"])
    async def test_a_cancelled_task_stops_generating(self, passes, way):
        async def stream():
            return [chunk async for chunk in self.chat.astream("w1")]

        task = asyncio.create_task(self.chat.ainvoke("w1") if way == "ainvoke" else stream())
        while len(passes) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        before = len(passes)
        await _until_idle()
        assert len(passes) - before <= 2
        assert (await self.chat.ainvoke("w1", max_tokens=2)).content

    async def test_a_closed_stream_stops_generating(self, passes):
        stream = self.chat.stream("w1")
        next(stream)
        stream.close()
        before = len(passes)
        await _until_idle()
        assert len(passes) - before <= 2

    async def test_cancelling_one_call_of_a_batch_keeps_the_other(self, passes):
        kept, lost = (asyncio.create_task(self.chat.ainvoke("w1", max_tokens=20)) for _ in range(2))
        while len(passes) < 5:
            await asyncio.sleep(0.001)
        lost.cancel()
        assert (await kept).usage_metadata["output_tokens"] == 20

    async def test_calls_cancelled_before_they_began_are_not_run(self, passes):
        first = asyncio.create_task(self.chat.ainvoke("w1", max_tokens=20))
        while len(passes) < 3:
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(self.chat.ainvoke("w1", max_tokens=100)) for _ in range(10)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await first
        await _until_idle()
        assert len(passes) < 40


async def _until_idle():
    while any(thread.name == "gradmem-batches" for thread in threading.enumerate()):
        await asyncio.sleep(0.005)


def test_batching_does_not_keep_a_pipeline_alive():
    import gc
    import weakref

    pipeline = tiny_pipeline()
    ChatGradMem(pipeline=pipeline, max_tokens=2).invoke("w1")
    gone = weakref.ref(pipeline)
    del pipeline
    while any(thread.name == "gradmem-batches" for thread in threading.enumerate()):
        time.sleep(0.005)
    gc.collect()
    assert gone() is None
