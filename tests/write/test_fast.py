"""Fast passes of WRITE: same numbers, compiled once per bucket, model left unchanged."""

import copy
import pickle
import threading
import warnings
import weakref
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.capture import static_shapes
from gradmem_adapter.write import fast
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.cuda_graph import Bucket, FastPass
from gradmem_adapter.write.fast import unsuited
from gradmem_adapter.write.loss import Pass, write_pass
from gradmem_adapter.write.plan import Plan


def make(backbone=None, **kwargs):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(backbone or tiny(), GradMemConfig(**defaults | kwargs)).eval()


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def lora(**kwargs):
    return LoraConfig(r=2, init_lora_weights=False, **{"target_modules": "all-linear"} | kwargs)


def batch(model, *lengths):
    ids = tokens(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    memory = model.base_model.slots.gradmem_memory["default"].detach().expand(len(lengths), -1, -1)
    return memory, Context.from_tokens(ids, mask.long(), model.get_base_model(), model.prefix_length)


def compare(model, memory, context, tolerance=1e-5, **options):
    writer = model.base_model._writer
    fast = FastPass(writer, **{"compiled": False, "graphed": False} | options)
    plan = Plan(len(memory))
    for gradient, first in product((True, False), repeat=2):
        expected = write_pass(writer, memory, context, gradient, first)
        for value, right in zip(fast(plan, memory, context, gradient, first), expected, strict=True):
            if right is None:
                assert value is None
            else:
                torch.testing.assert_close(value, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_of_the_twin_equals_the_models_own(architecture):
    model = make(tiny(architecture), write_head=architecture == "llama")
    compare(model, *batch(model, 5, 3, 4))  # within the tiny models' attention windows


@pytest.mark.parametrize("phase", ["both", "write", "read"])
def test_the_twin_applies_the_lora_of_write(phase):
    model = make(lora_config=lora(), lora_phase=phase)
    memory, context = batch(model, 9, 5)
    compare(model, memory, context)
    plain = make()
    plain.base_model.slots.gradmem_memory = model.base_model.slots.gradmem_memory
    changed = not torch.allclose(model.write(context.input_ids).vectors, plain.write(context.input_ids).vectors)
    assert changed == (phase != "read")


def test_graphs_and_events_are_on_the_models_device(monkeypatch):
    """It need not be the current device, which is `None` here."""
    events = []

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            events.append((self.device, other.device))

        def wait_event(self, event):
            event.wait(self)

        def record_event(self, event):
            event.record(self)

    class Event:
        def record(self, stream=None):
            events.append(stream and stream.device)

        wait = record

    fakes = {
        "Stream": Stream, "current_stream": Stream, "Event": Event, "synchronize": events.append,
        "stream": nullcontext, "graph": lambda graph, **_: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model = make()
    memory, context = batch(model, 9, 5)
    made = FastPass(model.base_model._writer, compiled=False, graphed=False)
    made.graphs = SimpleNamespace(get=lambda key, capture: capture(None))
    own = made._own
    monkeypatch.setattr(made, "_own", lambda *copied: events.append("copied") or own(*copied))
    found = made(Plan(2), memory, context, True, False)
    here = memory.device
    assert events == [(here, here), (here, here), here, here, "copied", here]
    torch.testing.assert_close(found.losses, write_pass(model.base_model._writer, memory, context, True, False).losses)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compiled_layers_give_the_same_states(architecture):
    model = make(tiny(architecture), lora_config=lora(target_modules=None) if architecture == "llama" else None)
    ids = tokens(3, 40)
    mask = torch.arange(40) < torch.tensor([[40], [12], [33]])
    fast, plain = (model.write(ids, mask.long(), steps=4, compile=compile) for compile in (True, False))
    assert relative(fast.vectors, plain.vectors) < 1e-5
    torch.testing.assert_close(fast.write_losses, plain.write_losses, rtol=1e-5, atol=1e-6)


def test_random_lengths_compile_at_most_once_per_bucket():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, generator = make(), torch.Generator().manual_seed(0)
    buckets = set()
    for _ in range(200):
        size, length = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 5), (2, 94)))
        ids = tokens(size, length)
        model.write(ids, steps=1, compile=True)
        buckets.add(Bucket.of(Context(ids, ids[:, 0]), None))
    # Layer and cross entropy, with and without gradients: for one sample or token, and for any other number.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 10 < 2 * len(buckets)


@given(st.integers(1, 200), st.integers(1, 9000))
def test_a_bucket_is_only_slightly_larger_than_its_contents(size, length):
    bucket = Bucket.of(Context(torch.empty(size, length), torch.empty(size)), None)
    assert size <= bucket.batch <= size * 9 / 8
    assert length <= bucket.length <= max(length + 63, length * 9 / 8)


def test_a_bucket_stays_within_the_models_positions():
    assert Bucket.of(Context(torch.empty(1, 8180), torch.empty(1)), 8184).length == 8184


def test_a_bucket_leaves_positions_for_states_side_by_side():
    """24 vectors leave 72 of the 96 positions; each memory shape needs its own graph."""
    model, keys = make(), []
    writer = model.base_model._writer
    fast = FastPass(writer, compiled=False, graphed=False)

    class Pool:
        def get(self, key, capture):
            keys.append(key)
            return lambda memory, context, rows: write_pass(writer, memory, context, gradient=True, recovered=False)

    fast.graphs = Pool()
    _, context = batch(model, 65)  # a bucket of 128 tokens, if there were enough positions
    for vectors in (3, 24):
        fast(Plan(1), torch.zeros(1, vectors, 32), context, True, False)
    (small, _, _), (large, _, _) = keys
    assert (small.length, large.length) == (93, 72)
    assert len(set(keys)) == 2


def test_padding_to_a_bucket_changes_nothing():
    model = make()
    memory, context = batch(model, 9, 5, 7)
    writer = model.base_model._writer
    gradient, losses, recovered = write_pass(writer, memory, context, True, True)
    with static_shapes():
        padded = Bucket(5, 64).pad(memory, context)
        assert padded[1].input_ids.shape == (5, 64)
        values = write_pass(writer, *padded, True, True)
    for value, expected in zip(values, (gradient, losses, recovered), strict=True):
        torch.testing.assert_close(value[:3], expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_write_leaves_the_model_unchanged():
    backbone = tiny()
    model = make(backbone, train_backbone=True)
    config, layers = copy.deepcopy(backbone.config), [type(layer) for layer in backbone.modules()]
    before = model.write(tokens(2, 9), compile=False).vectors
    model.write(tokens(2, 9), compile=True)
    assert backbone.config.to_dict() == config.to_dict()
    assert backbone.config._attn_implementation == config._attn_implementation
    assert [type(layer) for layer in backbone.modules()] == layers
    assert all(getattr(module, "_compiled_call_impl", None) is None for module in backbone.modules())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert torch.equal(model.write(tokens(2, 9), compile=False).vectors, before)
    assert torch.equal(copy.deepcopy(model).write(tokens(2, 9)).vectors, before)
    assert torch.equal(pickle.loads(pickle.dumps(model.base_model)).write(tokens(2, 9)).vectors, before)


def test_changed_weights_take_effect():
    model = make()
    ids = tokens(2, 9)
    model.write(ids, compile=True)
    with torch.no_grad():  # in place, and by assigning another tensor
        model.base_model.slots.gradmem_memory["default"].mul_(2)
        for parameter in model.base_model.model.parameters():
            parameter.data = parameter.data * 1.5
    fast, plain = (model.write(ids, compile=compile).vectors for compile in (True, False))
    assert relative(fast, plain) < 1e-5


def test_switching_adapters_takes_effect():
    model = make(lora_config=lora())
    model.add_adapter(
        "other", GradMemConfig(num_memory_tokens=3, write_lr=0.3, memory_init_std=0.5, lora_config=lora())
    )
    ids = tokens(2, 9)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        fast, plain = (model.write(ids, compile=compile).vectors for compile in (True, False))
        assert relative(fast, plain) < 1e-5


def test_models_and_contexts_unsuited_to_a_fast_pass():
    model = make(tiny("mistral"))
    context = batch(model, 9, 5)[1]
    writer = model.base_model._writer
    assert unsuited(writer, context, 3) is None
    window = model.config.sliding_window
    assert "window" in unsuited(writer, batch(model, window)[1], 3)
    assert "window" in unsuited(writer, context, window)
    with pytest.raises(ValueError, match="compile=True is not possible: the contexts are longer"):
        model.write(tokens(1, window), compile=True)
    model.write(tokens(1, window))
    model.train()
    assert "training" in unsuited(writer, context, 3)
    model.eval()
    layer = model.base_model.model.model.layers[0]
    layer.forward = layer.forward
    assert "replaced" in unsuited(writer, context, 3)
    del layer.forward
    model.base_model.model.lm_head.to("meta")
    assert "several devices" in unsuited(writer, context, 3)


def test_a_fast_pass_that_differs_from_the_plain_one_is_not_used(monkeypatch):
    model, ids = make(), tokens(2, 9)
    expected = model.write(ids, compile=False).vectors

    def broken(self, plan, memory, context, gradient, first):
        slope, losses, recovered = write_pass(self.writer, memory, context, gradient, first)
        return Pass(None if slope is None else -slope, losses, recovered)

    monkeypatch.setattr(FastPass, "__call__", broken)
    with pytest.raises(ValueError, match="its write gradients or losses differ"):
        model.write(ids, compile=True)
    with pytest.raises(ValueError, match="its write gradients or losses differ"):  # not tried again
        model.write(ids, compile=True)
    assert torch.equal(model.write(ids).vectors, expected)


@pytest.mark.parametrize(
    ("dtype", "gradient", "loss", "same"),
    [
        (torch.bfloat16, 0.3, 0.002, True),
        (torch.bfloat16, 0.3, 0.05, False),
        (torch.bfloat16, 0.8, 0.0, False),
        (torch.float32, 1e-4, 1e-4, True),
        (torch.float32, 0.01, 0.0, False),
        (torch.float32, 0.0, 0.01, False),
    ],
)
def test_rounding_is_distinguished_from_wrong_results(dtype, gradient, loss, same):
    """In bf16 a compiled pass of SmolLM2 with untrained slots differs by 0.1 to 0.3, and its losses by 0.001."""
    model = make(tiny().to(dtype))
    expected = Pass(torch.randn(2, 3, 4), torch.tensor([4.0, 3.0]), None)
    found = Pass(expected[0] * (1 + gradient), expected[1] * (1 + loss), None)
    assert FastPass(model.base_model._writer, compiled=False, graphed=False).agrees(found, expected) is same


def test_a_fast_pass_out_of_memory_is_freed_before_the_plain_one(monkeypatch):
    model, ids, held, alive = make(), tokens(2, 9), [], []
    expected = model.write(ids, compile=False).vectors

    def too_large(self, plan, memory, context, gradient, first):
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def plain(*args):
        alive.append(held[-1]() is not None)
        return write_pass(*args)

    monkeypatch.setattr(FastPass, "__call__", too_large)
    monkeypatch.setattr(FastPass, "graphs", property(lambda self: True, lambda self, pool: None), raising=False)
    monkeypatch.setattr(FastPass, "clear", lambda self: alive.append(held[-1]() is not None))
    monkeypatch.setattr(fast, "write_pass", plain)
    assert torch.equal(model.write(ids, compile=True).vectors, expected)
    assert len(alive) == 2 * len(held) > 0
    assert not any(alive)


def test_compile_auto_is_plain_on_a_cpu(monkeypatch):
    monkeypatch.setattr(fast, "FastPass", None)
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.write(tokens(2, 9))


@pytest.mark.parametrize("compile", ["yes", 2])
def test_an_invalid_compile_value_is_refused(compile):
    with pytest.raises(ValueError, match="compile must be True, False or 'auto'"):
        make().write(tokens(2, 9), compile=compile)


def test_threads_can_write_compiled_at_the_same_time():
    model = make()
    contexts = [tokens(2, 20, seed=seed) for seed in range(4)]
    expected = [model.write(ids, compile=True).vectors for ids in contexts]
    results = {}

    def work(index):
        for _ in range(5):
            results[index] = model.write(contexts[index], compile=True).vectors

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, right in enumerate(expected):
        assert torch.equal(results[index], right)
