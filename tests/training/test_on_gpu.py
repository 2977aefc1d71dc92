"""Captured training steps on a GPU give the same as plain ones; skipped on machines without a GPU."""

import distributed_run
import pytest
import torch
import two_processes
from test_trainer import Gradients, logs, make, rows, same, trainer
from tiny import tiny, tiny_tokenizer
from transformers import TrainerCallback

from gradmem_adapter.training import GradMemCollator, RowBatches
from gradmem_adapter.training.cuda_graph import GraphedBackward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LORA = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(autouse=True)
def _precise():
    """Transformers turns TF32 on for a compiled run, and leaves it on."""
    yield
    torch.set_float32_matmul_precision("highest")


def run(path, steps=14, callbacks=(), **options):
    """A run on rows of two lengths of context, with one and two write steps: each kind is captured and replayed."""
    data = RowBatches(
        [*rows(6, queries=2), *({**row, "context": row["context"] * 4} for row in rows(6, 40))],
        GradMemCollator(tiny_tokenizer()), buckets=[16, 64], contexts=4, write_steps=[1, 2],
        side_by_side=options.pop("side_by_side", [1]),
    )  # fmt: skip
    config = {"lora_config": LORA, "learn_write_lr": "scalar", "meta_gradient": options.pop("meta_gradient")}
    made = trainer(
        make(backbone=tiny(), finite_difference_step=0.1, **config), path, data, callbacks=callbacks,
        teacher=options.pop("teacher", None), max_steps=steps, use_cpu=False, learning_rate=1e-3, **options,
    )  # fmt: skip
    made.train()
    return made


@pytest.fixture
def captured(monkeypatch):
    """The graphs that are captured."""
    graphs, capture = [], GraphedBackward._capture
    monkeypatch.setattr(
        GraphedBackward, "_capture", lambda self, batch: graphs.append(capture(self, batch)) or graphs[-1]
    )
    return graphs


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
def test_captured_steps_equal_plain_steps(tmp_path, captured, meta_gradient, accumulated):
    options = {"meta_gradient": meta_gradient, "gradient_accumulation_steps": accumulated}
    expected, found = Gradients(), Gradients()
    plain = run(tmp_path / "plain", 20, [expected], **options)
    graphed = run(tmp_path / "graphed", 20, [found], cuda_graphs=True, **options)
    assert len(captured) == 4  # two lengths with one and two write steps
    assert logs(graphed, "loss")[:14] == pytest.approx(logs(plain, "loss")[:14], rel=1e-2)
    for one, two in zip(expected.steps[:5], found.steps[:5], strict=True):
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, rtol=5e-2, atol=1e-2 * gradient.norm().item(), msg=name)


def test_compiled_steps_in_bf16(tmp_path):
    plain = run(tmp_path / "plain", meta_gradient="finite_difference", bf16=True)
    fast = run(tmp_path / "fast", meta_gradient="finite_difference", bf16=True, cuda_graphs=True, torch_compile=True)
    assert logs(fast, "loss") == pytest.approx(logs(plain, "loss"), rel=3e-2)


def test_a_teacher_and_states_side_by_side(tmp_path):
    options = {"meta_gradient": "finite_difference", "side_by_side": [[3, 2]], "steps": 20}
    plain = run(tmp_path / "plain", teacher=tiny(seed=1), **options)
    fast = run(tmp_path / "fast", teacher=tiny(seed=1), cuda_graphs=True, torch_compile=True, **options)
    for name in ("loss", "distillation_loss"):  # in TF32, so that weights drift apart
        assert logs(fast, name) == pytest.approx(logs(plain, name), rel=5e-2)


class Forbid(TrainerCallback):
    """Between two steps nothing may wait for the GPU: Python could not prepare the next step meanwhile."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_gpu_between_logs(tmp_path, captured):
    try:
        run(
            tmp_path, 60, [Forbid(40, 55)], meta_gradient="first_order", cuda_graphs=True, logging_steps=100,
            muon_lr_factor=1.0, write_lr_factor=2.0,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(captured) == 4


class Memory(TrainerCallback):
    """What is allocated after each step."""

    def __init__(self):
        self.allocated = []

    def on_step_end(self, *args, **kwargs):
        self.allocated.append(torch.cuda.memory_allocated())


def test_memory_does_not_grow_and_is_freed(tmp_path):
    memory = Memory()
    made = run(tmp_path, 60, [memory], meta_gradient="first_order", cuda_graphs=True, logging_steps=100)
    assert memory.allocated[-1] <= memory.allocated[40] + 2**20
    assert made._graphed is None
    assert torch.cuda.memory_allocated() < memory.allocated[-1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_give_the_same_as_one(tmp_path, monkeypatch):
    """Over NCCL, each with the whole model (also by CUDA graphs) or a half of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # for the single process; the two count for themselves
    names = ("exact", "finite_difference")
    first, second = two_processes.start(
        "training/distributed_run.py", ",".join(names), tmp_path, folder=tmp_path, cuda=True
    )[0]
    assert first["ready"]["logs"] == second["ready"]["logs"]
    for name in names:
        one = distributed_run.train(tmp_path / f"one {name}", 1, name, use_cpu=False)
        for run in (name, f"sharded {name}"):
            assert same(first[run]["weights"], second[run]["weights"])
            assert same(first[run]["weights"], first[run]["resumed"])
            assert first[run]["logs"]["loss"] == pytest.approx(one["logs"]["loss"], rel=1e-3)
            for shared, alone in zip(first[run]["gradients"], one["gradients"], strict=True):
                for weight, gradient in alone.items():
                    assert (shared[weight] - gradient.cpu()).norm() < 1e-3 * gradient.norm().item() + 1e-5, (
                        run,
                        weight,
                    )
