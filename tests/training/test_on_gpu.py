"""Captured training steps on a GPU, which give what steps as they are give; skipped on machines without one."""

import pytest
import torch
from test_trainer import Gradients, logs, make, rows, trainer, weights
from tiny import tiny, tiny_tokenizer

from gradmem_adapter.training import GradMemCollator, RowBatches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LORA = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


def run(path, steps=14, **options):
    """A run on rows of two lengths of context, with and without write steps: each kind is captured and replayed."""
    seen = Gradients()
    data = RowBatches(
        [*rows(6, queries=2), *({**row, "context": row["context"] * 4} for row in rows(6, 40))],
        GradMemCollator(tiny_tokenizer()), buckets=[16, 64], contexts=4, write_steps=[1, 2],
    )  # fmt: skip
    config = {"lora_config": LORA, "learn_write_lr": "scalar", "meta_gradient": options.pop("meta_gradient")}
    made = trainer(
        make(backbone=tiny(), finite_difference_step=0.1, **config), path, data, callbacks=[seen], max_steps=steps,
        use_cpu=False, learning_rate=1e-3, **options,
    )  # fmt: skip
    made.train()
    return made, seen.steps


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
def test_equal_steps_as_they_are(tmp_path, meta_gradient, accumulated):
    options = {"meta_gradient": meta_gradient, "gradient_accumulation_steps": accumulated}
    plain, expected = run(tmp_path / "plain", **options)
    graphed, found = run(tmp_path / "graphed", cuda_graphs=True, **options)
    assert graphed._graphed._graphs  # some were replayed
    assert logs(graphed, "loss") == pytest.approx(logs(plain, "loss"), rel=1e-2)
    for one, two in zip(expected[:5], found[:5], strict=True):
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, rtol=5e-2, atol=1e-2 * gradient.norm().item(), msg=name)


def test_compiled_and_in_bf16(tmp_path):
    plain, _ = run(tmp_path / "plain", meta_gradient="finite_difference", bf16=True)
    fast, _ = run(tmp_path / "fast", meta_gradient="finite_difference", bf16=True, cuda_graphs=True, torch_compile=True)
    assert logs(fast, "loss") == pytest.approx(logs(plain, "loss"), rel=3e-2)


def test_nothing_waits_for_the_gpu_between_logs(tmp_path):
    """What is read from the GPU at every step would leave it idle while Python prepares the next."""
    made, _ = run(tmp_path / "warm", meta_gradient="first_order", cuda_graphs=True, logging_steps=100)
    before = torch.cuda.get_sync_debug_mode()
    batches = [made.train_dataset.batch(step, made.args.device) for step in range(4)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            made.get_batch_samples(iter(()), 1, made.args.device)
            made.training_step(made.model, batch)
            made._get_grad_norm(made.model, made._clip_grad_norm(made.model))
            made.optimizer.step()
            made.lr_scheduler.step()
            made.model.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_memory_does_not_grow(tmp_path):
    made, _ = run(tmp_path / "short", meta_gradient="first_order", cuda_graphs=True)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        (batch,), _ = made.get_batch_samples(iter(()), 1, made.args.device)
        made.state.global_step += 1
        made.training_step(made.model, batch)
        made.model.zero_grad()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert all(weight.isfinite().all() for weight in weights(made.model).values())
