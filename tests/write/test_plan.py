"""WRITE within a memory budget: the same states, with as many bytes as predicted."""

import gc
import warnings
import weakref
from itertools import pairwise
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evaluation.results import RESULTS, load_records
from gradmem_adapter import GradMemConfig
from gradmem_adapter.ops.cross_entropy import FUSED, FusedCrossEntropy
from gradmem_adapter.utils import hardware
from gradmem_adapter.write import budget, plan
from gradmem_adapter.write.budget import BoundedPass, Budget
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import write_pass
from gradmem_adapter.write.plan import Footprint, Plan, plans, saved_bytes
from gradmem_adapter.write.recompute import recomputed

GPU = torch.device("cuda")
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 400}
SHAPES = {
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_positions": 400},
    "opt": WIDE | {"ffn_dim": 256},
    "gemma3_text": WIDE | {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 32},
    "mistral": WIDE | {"head_dim": 32},
    "mixtral": WIDE | {"num_local_experts": 4},
}
"""Wide enough that only what grows with the tokens counts."""


def make(backbone=None, **kwargs):
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(backbone or tiny(), GradMemConfig(**defaults | kwargs)).eval()


def batch(*lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tokens(len(lengths), max(lengths)), mask.long()


def compile_soon(layer, **options):
    """Like `nn.Module.compile`, but without Inductor, which is slow."""
    layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager", **options)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors created inside that are still alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        output = function(*args, **kwargs or {})
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in (*given, *self.sizes):
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return output

    def gone(self, place):
        self.now -= self.sizes.pop(place)


class TestStates:
    """Recomputation never changes a state."""

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_gradients_equal_those_of_the_plain_pass(self, architecture):
        model = make(tiny(architecture).double())
        writer, (ids, mask) = model.base_model._writer, batch(9, 5, 7)
        context = Context.from_tokens(ids, mask, model.get_base_model(), model.prefix_length)
        memory = model.base_model.slots.gradmem_memory["default"].detach().double().expand(3, -1, -1)
        expected = write_pass(writer, memory, context, True, True)
        for chosen in (Plan(3, 1), Plan(3, 2), Plan(2, 2), Plan(1, 2, offloaded=True)):
            run = BoundedPass(
                Budget.of(model.get_base_model()), [chosen], lambda p: lambda *args: write_pass(p.of(writer), *args)
            )
            for found, right in zip(run(memory, context, True, True), expected, strict=True):
                torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("phase", ["both", "write", "read"])
    def test_a_lora_is_active_in_recomputed_layers(self, phase):
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        self.compare(make(lora_config=lora, lora_phase=phase, start="context"))

    @pytest.mark.slow
    def test_compiled_layers_are_recomputed(self, monkeypatch):
        monkeypatch.setattr(torch.nn.Module, "compile", compile_soon)
        monkeypatch.setattr(FusedCrossEntropy, "compiled", lambda: FUSED)
        self.compare(make(), compile=True)

    @staticmethod
    def compare(model, **options):
        ids, mask = batch(30, 12, 30)
        backbone = model.get_base_model()
        expected = model.write(ids, mask)
        few = Budget.of(backbone).bytes(Plan(1, 1), 30)
        frugal = model.write(ids, mask, max_memory=int(few) + 1, **options)
        torch.testing.assert_close(frugal.vectors, expected.vectors, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(frugal.write_losses, expected.write_losses, rtol=1e-4, atol=1e-6)

    def test_dropout_is_the_same_in_recomputed_layers(self):
        model = make(tiny("gpt2", embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.3).double()).train()
        writer, ids = model.base_model._writer, tokens(1, 9)
        memory = model.base_model.slots.gradmem_memory["default"].detach().double()[None]

        def gradient(chosen):
            torch.manual_seed(1)
            return write_pass(chosen.of(writer), memory, Context(ids, torch.tensor([9])), True, False).gradient

        torch.testing.assert_close(gradient(Plan(1, 2)), gradient(Plan(1)), rtol=1e-9, atol=1e-12)

    def test_recomputation_leaves_the_model_unchanged(self):
        backbone = tiny()
        before = [(name, id(module), module.__dict__.copy()) for name, module in backbone.named_modules()]
        other = recomputed(backbone, 1, offloaded=True)
        other(tokens(1, 4)).logits.sum().backward()
        assert [(name, id(module)) for name, module in backbone.named_modules()] == [(n, i) for n, i, _ in before]
        assert all("forward" not in fields for _, _, fields in before)
        assert all("forward" not in module.__dict__ for module in backbone.modules())
        assert other.model.embed_tokens is backbone.model.embed_tokens
        assert other.model.layers[1] is backbone.model.layers[1] is not other.model.layers[0]


class TestBytes:
    """The estimate against what is measured."""

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
    def test_saved_bytes_are_predicted_from_a_few_tokens(self, architecture, attention):
        backbone = tiny(architecture, attn_implementation=attention, **SHAPES.get(architecture, WIDE))
        footprint, n = Footprint.of(backbone), 300
        foretold = footprint.token * n + footprint.pair * n * n
        assert foretold == pytest.approx(saved_bytes(backbone, n), rel=0.06)
        assert (footprint.pair > 16) == (attention == "eager")  # a few bytes belong to a mask
        kept = saved_bytes(recomputed(backbone, 4), n)
        assert 4 * footprint.inputs * n <= kept < 8 * footprint.inputs * n  # and what comes before and after the layers

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text", "mixtral"])
    @pytest.mark.parametrize("chosen", [Plan(2), Plan(2, 2), Plan(1, 4)], ids=str)
    def test_the_peak_is_predicted(self, architecture, chosen, monkeypatch):
        monkeypatch.setitem(hardware.OVERHEAD, "cpu", 1.0)
        backbone = tiny(architecture, **SHAPES.get(architecture, WIDE)).requires_grad_(False)
        model, ids = make(backbone), tokens(2, 150)
        writer, context = model.base_model._writer, Context(ids, torch.full((2,), 150))
        memory = model.base_model.slots.gradmem_memory["default"].detach().expand(2, -1, -1)
        foretold = Footprint.of(backbone).bytes(chosen, 150)
        run = BoundedPass(Budget.of(backbone), [chosen], lambda p: lambda *args: write_pass(p.of(writer), *args))
        gc.collect()
        with Live() as live:
            run(memory, context, True, False)
        assert 0.75 * foretold < live.most < 1.1 * foretold

    def test_peaks_measured_on_an_h200_are_predicted(self):
        """With compiled layers, at Llama-3.1-8B's shape, where 4.478 MB per token were measured."""
        footprint = Footprint(32, 0.0, 4.478e6, 0.0, 8192.0, 128256, GPU)
        records = [r for r in load_records(RESULTS / "write_sizes.jsonl") if r.settings["shape"] == "llama-3.1-8b"]
        assert {record.metrics["offloaded"] for record in records} == {True, False}
        for found, length in ((record.metrics, record.settings["length"]) for record in records):
            chosen = Plan(found["rows"], found["recomputed"], found["offloaded"])
            assert 0.93 < found["peak_gib"] * 2**30 / footprint.bytes(chosen, length, compiled=True) < 1, chosen

    def test_measuring_saved_bytes_keeps_nothing(self):
        backbone = tiny(**WIDE)
        gc.collect()
        with Live() as live:
            saved = saved_bytes(backbone, 300)
        assert live.most < saved / 2

    def test_a_trained_lora_saves_more_bytes(self):
        lora = LoraConfig(r=2, target_modules="all-linear")
        plain, with_lora = make(), make(lora_config=lora)
        frozen, trained = (Footprint.of(model.get_base_model()) for model in (plain, with_lora))
        assert trained.token > frozen.token

    def test_measuring_draws_no_random_numbers(self):
        backbone = tiny("gpt2", embd_pdrop=0.3).train()
        torch.manual_seed(1)
        Footprint.of(backbone)
        drawn = torch.rand(1)
        torch.manual_seed(1)
        assert torch.rand(1) == drawn


class TestPlans:
    def test_each_plan_needs_less_memory_than_the_one_before(self):
        footprint = Footprint(32, 0.0, 4e6, 0.0, 8192.0, 128256, GPU)
        for size, length in ((1, 32768), (8, 1024), (7, 9000), (64, 8192)):
            found = plans(size, length, 32, GPU)
            needed = [footprint.bytes(chosen, length) for chosen in found if not chosen.offloaded]
            assert all(less < more for more, less in pairwise(needed)), needed
            assert found[0] == Plan(size)
            assert found[-4:] == [Plan(1, again, offloaded=True) for again in range(28, 32)]

    def test_contexts_are_split_first_while_the_gpu_stays_busy(self):
        found = plans(8, 8192, 32, GPU)
        assert found[:4] == [Plan(8), Plan(4), Plan(2), Plan(2, 1)]
        assert plans(8, 512, 32, GPU)[:3] == [Plan(8), Plan(8, 1), Plan(8, 2)]

    def test_contexts_are_split_when_no_layer_can_be_recomputed(self):
        assert plans(3, 10, 0, torch.device("cpu")) == [Plan(3), Plan(2), Plan(1)]


class TestBudget:
    def test_the_fastest_plan_that_fits_is_chosen(self):
        backbone = tiny(num_hidden_layers=8)
        own = Budget.of(backbone)
        assert Budget.of(backbone) is own is not Budget.of(tiny())
        for chosen in plans(4, 20, 8, torch.device("cpu")):
            found = own.plans(4, 20, int(own.bytes(chosen, 20)) + 1)
            assert found[0] == chosen
        with pytest.raises(MemoryError, match="one context after the other of 20 tokens takes"):
            own.plans(4, 20, 1000)

    def test_inputs_are_offloaded_if_the_cpu_has_room(self, monkeypatch):
        backbone, free = tiny(num_hidden_layers=8), {"cuda": 2**40, "cpu": 2**40}
        monkeypatch.setattr(budget, "free_memory", lambda device: free[device.type])
        monkeypatch.setattr(plan, "device_of", lambda backbone: GPU)
        monkeypatch.setattr(budget, "device_of", lambda backbone: GPU)
        monkeypatch.setattr(plan, "saved_bytes", lambda backbone, length: 4096 * 8 * length)
        own = Budget.of(backbone)
        assert own.plans(1, 20, 10**9)[-1].offloaded
        free["cpu"] = 1000
        assert own.plans(1, 20, 10**9)[-1] == Plan(1, 7)

    def test_free_memory_is_checked_for_large_writes_only(self, monkeypatch):
        backbone, asked = tiny(), []
        monkeypatch.setattr(budget, "free_memory", lambda device: asked.append(device) or 10**4)
        assert Budget.of(backbone).plans(1, 20, "auto")[0] == Plan(1)
        monkeypatch.setattr(budget, "UNCHECKED", 0)
        with pytest.raises(MemoryError, match="1e-05 GB are free"):
            Budget.of(backbone).plans(1, 20, "auto")
        assert len(asked) == 1


class Full:
    """`write_pass` on a GPU with room for the activations of a given number of layers."""

    def __init__(self, layers):
        self.layers, self.seen, self.held = layers, [], []

    def __call__(self, writer, memory, context, gradient, recovered):
        layers = writer.backbone.model.layers
        kept = len(memory) * sum("forward" not in layer.__dict__ for layer in layers)
        self.seen.append((len(memory), kept))
        if kept > self.layers:
            activations = torch.zeros(3)
            self.held.append(weakref.ref(activations))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        assert all(reference() is None for reference in self.held)
        return write_pass(writer, memory, context, gradient, recovered)


class TestOutOfMemory:
    @pytest.fixture
    def full(self, monkeypatch):
        full = Full(1)
        monkeypatch.setattr("gradmem_adapter.write.fast.write_pass", full)
        return full

    def test_the_next_plan_is_used_with_one_warning(self, full):
        model, ids = make(), tokens(2, 9)
        with mock.patch("gradmem_adapter.write.fast.write_pass", write_pass):
            expected = model.write(ids)
        with pytest.warns(RuntimeWarning, match="Out of memory in WRITE with 2 contexts at a time; continuing") as said:
            found = model.write(ids)
        assert len(said) == 1
        torch.testing.assert_close(found.vectors, expected.vectors)
        assert full.seen[:3] == [(2, 4), (2, 2), (1, 1)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(model.write(ids).vectors, expected.vectors)

    def test_a_plan_that_did_not_fit_is_not_retried(self, full, monkeypatch):
        model, ids, full.layers = make(tiny(num_hidden_layers=8)), tokens(2, 9), 12
        free = 1.2 * Budget.of(model.get_base_model()).bytes(Plan(2), 9)
        monkeypatch.setattr(budget, "UNCHECKED", 0)
        monkeypatch.setattr(budget, "free_memory", lambda device: free)
        with pytest.warns(RuntimeWarning, match="Out of memory"):
            model.write(ids)
        assert [kept for _, kept in full.seen] == [16, 12, 12, 12]
        model.write(ids)
        assert [kept for _, kept in full.seen[4:]] == [12, 12, 12]

    def test_the_error_is_raised_when_no_plan_fits(self, full):
        full.layers = 0
        with pytest.warns(RuntimeWarning), pytest.raises(torch.cuda.OutOfMemoryError):
            make().write(tokens(2, 9))
        assert full.seen[-1] == (1, 1)


def test_unknown_layers_are_not_recomputed(monkeypatch):
    """As in models whose code comes with their weights."""
    monkeypatch.setattr(plan, "decoder_layers", lambda backbone: [])
    backbone = tiny()
    assert Budget.of(backbone).plans(2, 20, 10**9) == [Plan(2), Plan(1)]
