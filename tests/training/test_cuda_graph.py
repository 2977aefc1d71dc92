"""The path of CUDA graphs on a CPU, where nothing is captured; test_cuda.py has what needs a GPU."""

import math

import pytest
import torch
from test_trainer import LORA, Poison, arguments, close, gradients, logs, make, rows, trainer, weights
from tiny import tiny, tiny_tokenizer
from torch import nn

from gradmem_adapter.ops.attention import CAUSAL
from gradmem_adapter.training import Batches, GradMemCollator, GradMemTrainer, RowBatches, TrainingDiverged
from gradmem_adapter.training.cuda_graph import GraphedBackward, check_no_dropout, maskless_attention
from gradmem_adapter.utils.backbone import layers_of


class Fixed(Batches):
    """The same rows in every batch, two contexts at a time."""

    def batch(self, step, device):
        batch = GradMemCollator(tiny_tokenizer())(rows(4, queries=3)[2 * (step % 2) :][:2])
        return {name: batch[name] for name in batch if not name.startswith("query_") and name != "targets"}


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_equal_those_of_the_plain_step(tmp_path, meta_gradient, accumulated):
    config = {"lora_config": LORA, "learn_write_lr": "scalar", "meta_gradient": meta_gradient, "write_head": True}
    config["finite_difference_step"] = 0.1  # a long step leaves little rounding error
    options = {"write_steps": [2], "gradient_accumulation_steps": accumulated}
    plain, one = gradients(make(**config), tmp_path, Fixed(), **options)
    graphed, two = gradients(make(**config), tmp_path, Fixed(), cuda_graphs=True, **options)
    close(graphed, plain)
    for name in ("loss", "target_loss", "last_write_loss", "memory_norm", "memory_grad_norm", "grad_norm"):
        assert logs(two, name) == pytest.approx(logs(one, name), rel=1e-4), name


def test_the_backward_pass_also_runs_without_masks(tmp_path, monkeypatch):
    """A capture in which the finite difference made masks failed on a GPU."""
    model = make(lora_config=LORA, meta_gradient="finite_difference")
    seen = []
    backbone = model.get_base_model()
    forward = type(backbone.base_model).forward

    def spy(self, *args, **kwargs):
        seen.append(self.config._attn_implementation)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(backbone.base_model), "forward", spy)
    gradients(model, tmp_path, Fixed(), cuda_graphs=True, write_steps=[1])
    assert set(seen) == {CAUSAL}


def test_bf16_gradients_are_close_to_those_of_the_plain_step(tmp_path):
    lora = LORA | {"init_lora_weights": False}
    config = {"lora_config": lora, "meta_gradient": "finite_difference", "finite_difference_step": 0.1}
    plain, _ = gradients(make(**config), tmp_path, Fixed(), bf16=True)
    graphed, _ = gradients(make(**config), tmp_path, Fixed(), bf16=True, cuda_graphs=True)
    for name, value in plain.items():
        assert torch.nn.functional.cosine_similarity(value.flatten(), graphed[name].flatten(), dim=0) > 0.98, name


def test_layers_are_compiled_only_during_training(tmp_path):
    """And only for the shapes of ready batches."""
    config = {"lora_config": LORA, "meta_gradient": "first_order"}
    plain, _ = gradients(make(backbone=tiny(num_hidden_layers=1), **config), tmp_path, Fixed())
    torch._dynamo.reset()
    model = make(backbone=tiny(num_hidden_layers=1), **config)
    compiled, run = gradients(model, tmp_path, Fixed(), cuda_graphs=True, torch_compile_backend="aot_eager")
    close(compiled, plain)
    assert math.isfinite(run.evaluate(rows(2))["eval_loss"])
    assert all(layer._compiled_call_impl is None for layer in layers_of(model))


class TestGraphedBackward:
    def make(self):
        first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

        def run(batch):
            loss = (first * batch["x"]).square().sum()
            return (loss + second.sum() if batch["both"] else loss), batch["x"].sum()

        return GraphedBackward(run, [first, second]), first, second

    def test_gradients_add_up_until_they_are_set_to_none(self):
        graphed, first, second = self.make()
        x = torch.tensor([1.0, -2.0, 30.0])
        loss, table = graphed({"x": x, "both": 0})
        assert (loss, table) == (905, 29)
        assert not loss.requires_grad
        assert torch.equal(first.grad, 2 * x.square())
        assert second.grad is None  # it was not reached, and an optimizer leaves it alone
        graphed({"x": x, "both": 1})
        assert torch.equal(first.grad, 4 * x.square())
        assert torch.equal(second.grad, torch.ones(2))
        first.grad = second.grad = None
        graphed({"x": x, "both": 1})
        assert torch.equal(first.grad, 2 * x.square())
        assert torch.equal(second.grad, torch.ones(2))


def test_maskless_attention_changes_nothing_for_right_padded_batches():
    model = make(lora_config=LORA)
    batch = RowBatches(rows(5, queries=2), GradMemCollator(tiny_tokenizer())).batch(0, torch.device("cpu"))
    with torch.no_grad():
        expected = model(**batch).loss
        with maskless_attention(model):
            assert model.get_base_model().config._attn_implementation != "sdpa"
            actual = model(**batch).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("backbone", [tiny("mistral"), tiny("gemma3_text")], ids=["mistral", "gemma3"])
def test_attention_with_windows_is_left_unchanged(backbone):
    with maskless_attention(make(backbone=backbone)):
        assert backbone.config._attn_implementation == "sdpa"


class TestRefused:
    @pytest.mark.parametrize(
        "model",
        [
            lambda: make(lora_config=LORA | {"lora_dropout": 0.1}),
            lambda: make(backbone=tiny(attention_dropout=0.2)),
            lambda: make(backbone=tiny("gpt2")),
            lambda: make(backbone=tiny("opt")),
        ],
        ids=["lora", "attention", "gpt2", "opt"],
    )
    def test_models_with_dropout(self, tmp_path, model):
        with pytest.raises(ValueError, match=r"trains without dropout, but '.*' has dropout\. Set it to 0"):
            trainer(model(), tmp_path, rows(2), cuda_graphs=True)

    def test_models_without_dropout_are_accepted(self):
        check_no_dropout(make(lora_config=LORA))
        check_no_dropout(make("gpt2"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gradient_checkpointing": True}, "Leave one out: checkpointing saves memory, graphs time"),
            ({"fp16": True}, "Use bf16=True"),
        ],
    )
    def test_incompatible_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            trainer(make(), tmp_path, rows(2), cuda_graphs=True, **options)

    def test_a_loss_of_ones_own(self, tmp_path):
        """The captured step is the trainer's own; another loss was left out without a word."""

        class Own(GradMemTrainer):
            def compute_loss(self, *args, **kwargs):
                return 2 * super().compute_loss(*args, **kwargs)

        with pytest.raises(ValueError, match="does not call compute_loss, so the one of Own would have no effect"):
            Own(make(), arguments(tmp_path, cuda_graphs=True), train_dataset=rows(2), processing_class=tiny_tokenizer())

    def test_rows_from_an_iterator(self, tmp_path):
        with pytest.raises(ValueError, match="needs batches of few shapes"):
            trainer(make(), tmp_path, iter(rows(2)), cuda_graphs=True)


@pytest.mark.parametrize("saved", [True, False])
def test_divergence_is_seen_when_a_log_or_a_checkpoint_is_due(tmp_path, saved):
    model = make()
    run = trainer(
        model, tmp_path, Fixed(), callbacks=[Poison(2)], max_steps=8, save_steps=2, logging_steps=4, cuda_graphs=True,
        save_strategy="steps" if saved else "no",
    )  # fmt: skip
    where = "The last good checkpoint is .*checkpoint-2" if saved else "There is no checkpoint yet"
    with pytest.raises(TrainingDiverged, match=rf"loss is not finite since the last log, at step 4\..*{where}"):
        run.train()
    assert not all(weight.isfinite().all() for weight in weights(model).values())
    assert not (tmp_path / "checkpoint-4").exists()
