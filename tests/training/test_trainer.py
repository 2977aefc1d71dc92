"""The trainer: gradients of split batches, resuming, checkpoints, evaluation, and what stops or is refused."""

import inspect
import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments

from gradmem_adapter import GradMemConfig, GradMemPipeline, load_checkpoint
from gradmem_adapter.checkpoint import load_weights
from gradmem_adapter.training import (
    GradMemCollator,
    GradMemTrainer,
    GradMemTrainingArguments,
    RowBatches,
    TrainingDiverged,
)
from gradmem_adapter.training.sharding import whole
from gradmem_adapter.utils.backbone import layers_of

LORA = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.0}


NO_DROPOUT = {"llama": {}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def make(architecture="llama", backbone=None, seed=0, **config):
    """A model with an adapter; equal arguments give equal models."""
    backbone = tiny(architecture, **NO_DROPOUT[architecture]) if backbone is None else backbone
    torch.manual_seed(seed)
    defaults = {"num_memory_tokens": 2, "write_lr": 0.3, "memory_init_std": 0.5, "reconstruction_weight": 0.2}
    return get_peft_model(backbone, GradMemConfig(**defaults | config))


def rows(count, seed=0, queries=1):
    """Rows of ragged lengths."""
    return [row(i, seed) if queries == 1 else row_of_several(i, seed, 1 + i % queries) for i in range(count)]


def row(i, seed):
    return {
        "context": tiny_text(4 + i % 4, seed + i), "query": "Question :", "target": tiny_text(1 + i % 3, seed + i + 100)
    }  # fmt: skip


def row_of_several(i, seed, queries):
    return {
        "context": tiny_text(4 + i % 4, seed + i),
        "queries": [tiny_text(1 + (i + j) % 3, seed + 10 * i + j) for j in range(queries)],
        "targets": [tiny_text(1 + (i + 2 * j) % 3, seed + 10 * i + j + 100) for j in range(queries)],
    }


def arguments(path, **options):
    defaults = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return GradMemTrainingArguments(str(path), **defaults | options)


class Unlabelled(GradMemCollator):
    """Leaves out the labels of batches whose first context is one of these."""

    def __init__(self, tokenizer, *, contexts):
        super().__init__(tokenizer)
        self.contexts = contexts

    def __call__(self, rows):
        batch = super().__call__(rows)
        if rows[0]["context"] in self.contexts:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None})


def trainer(
    model, path, train=None, evaluation=None, callbacks=(), score=None, teacher=None, compute_metrics=None,
    optimizers=(None, None), **options,
):  # fmt: skip
    extra = {"compute_metrics": compute_metrics, "optimizers": optimizers} | ({} if score is None else {"score": score})
    return GradMemTrainer(
        model, arguments(path, **options), train_dataset=train, eval_dataset=evaluation,
        processing_class=tiny_tokenizer(), callbacks=list(callbacks), teacher=teacher, **extra,
    )  # fmt: skip


def gradients(model, path, train, **options):
    """The gradients of the first optimizer step, unclipped."""
    seen = Gradients()
    defaults = {"max_steps": 1, "max_grad_norm": 0, "train_sampling_strategy": "sequential"}
    run = trainer(model, path, train, callbacks=[seen], **defaults | options)
    run.train()
    return seen.steps[0], run


def close(first, second, atol=1e-6):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(
            gradient, second[name], rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def logs(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]


class TestLoss:
    @pytest.mark.parametrize("meta_gradient", ["exact", "first_order"])
    def test_the_loss_decreases(self, tmp_path, meta_gradient):
        model = make(meta_gradient=meta_gradient, train_backbone=True, learn_write_lr="scalar")
        run = trainer(model, tmp_path, rows(4), max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3)
        run.train()
        losses = logs(run, "loss")
        assert losses[-1] < 0.5 * losses[0]

    def test_the_loss_equals_that_of_the_model(self, tmp_path):
        model = make(lora_config=LORA)
        batch = GradMemCollator(tiny_tokenizer())(rows(3, queries=3))
        inputs = {name: batch[name] for name in batch if not name.startswith("query_") and name != "targets"}
        expected = model(**inputs, write_steps=3)
        expected.loss.backward()
        direct = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found, run = gradients(
            make(lora_config=LORA), tmp_path, rows(3, queries=3), per_device_train_batch_size=3, write_steps=[3],
        )  # fmt: skip
        close(found, direct)
        (entry,) = [entry for entry in run.state.log_history if "loss" in entry]
        assert entry["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert entry["target_loss"] == pytest.approx(expected.target_loss.item(), rel=1e-5)
        assert entry["first_write_loss"] == pytest.approx(expected.write_losses[:, 0].mean().item(), rel=1e-5)
        assert entry["last_write_loss"] == pytest.approx(expected.write_losses[:, -1].mean().item(), rel=1e-5)
        norm = expected.memory.flatten(1).norm(dim=1).mean().item()
        assert entry["memory_norm"] == pytest.approx(norm, rel=1e-5)
        assert entry["write_steps"] == 3
        slots = model.base_model.slots.gradmem_memory["default"].grad
        assert entry["memory_grad_norm"] == pytest.approx(slots.norm().item(), rel=1e-4)
        assert "write_lr" not in entry

    @pytest.mark.parametrize("batches", [False, True])
    def test_training_sets_the_trained_length_and_clears_the_calibration(self, tmp_path, batches):
        """A calibration holds only for the weights it was made with."""
        model, train = make(score_calibration=(1.0, 0.0), trained_length=3), rows(4)
        if batches:
            train = RowBatches(train, GradMemCollator(tiny_tokenizer()), buckets=[16], contexts=4)
        trainer(model, tmp_path, train).train()
        config = model.active_peft_config
        longest = max(len(tiny_tokenizer()(row["context"])["input_ids"]) for row in rows(4))
        assert (config.trained_length, config.score_calibration) == (longest, None)

    def test_the_learned_write_lr_is_logged(self, tmp_path):
        run = trainer(make(learn_write_lr="scalar"), tmp_path, rows(2), max_steps=1)
        run.train()
        assert logs(run, "write_lr")[0] == pytest.approx(0.3, rel=0.05)

    def test_memory_grad_norm_is_taken_before_clipping(self, tmp_path):
        found = [
            logs(gradients(make(), tmp_path, rows(2), max_grad_norm=limit)[1], "memory_grad_norm")[0]
            for limit in (0, 1e-3)
        ]
        assert found[0] == found[1] > 1e-3

    @pytest.mark.parametrize("meta_gradient", ["exact", "first_order"])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_gradient_accumulation_changes_nothing(self, tmp_path, architecture, meta_gradient):
        config = {"lora_config": LORA, "learn_write_lr": "scalar", "meta_gradient": meta_gradient}
        data = rows(4, queries=3)
        whole, one = gradients(make(architecture, **config), tmp_path, data, per_device_train_batch_size=4)
        halves, two = gradients(make(architecture, **config), tmp_path, data, gradient_accumulation_steps=2)
        singles, four = gradients(
            make(architecture, **config), tmp_path, data, per_device_train_batch_size=1, gradient_accumulation_steps=4
        )
        close(halves, whole)
        close(singles, whole)
        for name in ("loss", "target_loss", "first_write_loss", "last_write_loss", "memory_norm", "grad_norm"):
            assert logs(two, name) == pytest.approx(logs(one, name), rel=1e-4)
            assert logs(four, name) == pytest.approx(logs(one, name), rel=1e-4)

    def test_a_micro_batch_without_labels_adds_nothing(self, tmp_path):
        config = {"lora_config": LORA, "reconstruction_weight": 0.0}
        alone, _ = gradients(make(**config), tmp_path, rows(2)[:1], per_device_train_batch_size=1)
        seen = Gradients()
        run = trainer(
            make(**config), tmp_path, rows(2), callbacks=[seen], per_device_train_batch_size=1, max_steps=1,
            gradient_accumulation_steps=2, max_grad_norm=0, train_sampling_strategy="sequential",
        )  # fmt: skip
        run.data_collator = Unlabelled(run.processing_class, contexts={rows(2)[1]["context"]})
        run.train()
        close(seen.steps[0], alone)

    def test_a_step_without_any_label_says_so(self, tmp_path):
        run = trainer(make(), tmp_path, rows(2), rows(2), max_steps=1)
        run.data_collator = Unlabelled(run.processing_class, contexts={row["context"] for row in rows(2)})
        for work in (run.train, run.evaluate):
            with pytest.raises(ValueError, match="no target token: all its labels are -100"):
                work()

    def test_several_queries_equal_the_context_repeated(self, tmp_path):
        several = rows(3, queries=3)
        repeated = [
            {"context": row["context"], "query": query, "target": target}
            for row in several
            for query, target in zip(row["queries"], row["targets"], strict=True)
        ]
        config = {"lora_config": LORA, "reconstruction_weight": 0.0}
        once, _ = gradients(make(**config), tmp_path, several, per_device_train_batch_size=3)
        again, _ = gradients(make(**config), tmp_path, repeated, per_device_train_batch_size=len(repeated))
        close(once, again)

    def test_write_steps_are_drawn_per_optimizer_step(self, tmp_path):
        run = trainer(
            make(), tmp_path, rows(4), max_steps=12, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            write_steps=[1, 2, 3],
        )  # fmt: skip
        run.train()
        drawn = logs(run, "write_steps")
        assert set(drawn) == {1, 2, 3}  # whole numbers: both micro-batches of a step have the same

        def at(seed):
            other = trainer(make(), tmp_path, rows(4), seed=seed, write_steps=[1, 2, 3])
            steps = []
            for other.state.global_step in range(12):
                steps.append(other.write_steps())
            return steps

        assert at(run.args.seed) == drawn  # whatever random numbers were drawn in between
        assert at(7) != drawn

    def test_training_without_write_steps(self, tmp_path):
        run = trainer(make(), tmp_path, rows(2), rows(2), max_steps=1, write_steps=[0])
        run.train()
        assert logs(run, "write_steps") == [0]
        assert not logs(run, "first_write_loss")

    def test_without_write_steps_the_start_has_the_write_loss(self, tmp_path):
        """It is logged as a write loss and counts in training and evaluation, but is not a write step."""
        model = make(start="context", reconstruction_weight=0.5)
        options = {"write_steps": [0], "eval_write_steps": 0}
        run = trainer(model, tmp_path, rows(2), rows(2), max_steps=1, learning_rate=0.0, **options)
        run.train()
        found = run.evaluate()
        (loss,) = logs(run, "last_write_loss")
        assert logs(run, "write_steps") == [0] == [found["eval_write_steps"]]
        assert loss == pytest.approx(found["eval_last_write_loss"], rel=1e-4)
        assert found["eval_loss"] == pytest.approx(found["eval_target_loss"] + 0.5 * loss, rel=1e-4)
        assert logs(run, "loss")[0] == pytest.approx(found["eval_loss"], rel=1e-4)

    @pytest.mark.parametrize("meta_gradient", ["exact", "first_order", "finite_difference"])
    def test_gradient_checkpointing_changes_nothing(self, tmp_path, meta_gradient):
        config = {"lora_config": LORA, "meta_gradient": meta_gradient}
        plain, _ = gradients(make(**config), tmp_path, rows(2))
        model = make(**config)
        checkpointed, _ = gradients(model, tmp_path, rows(2), gradient_checkpointing=True)
        assert model.is_gradient_checkpointing
        close(checkpointed, plain)

    @pytest.mark.skipif(
        "every_n_layers" not in inspect.signature(PreTrainedModel._set_gradient_checkpointing).parameters,
        reason="Transformers computes all layers again or none",
    )
    def test_every_nth_layer_can_be_checkpointed(self, tmp_path):
        options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
        plain, _ = gradients(make(lora_config=LORA, meta_gradient="finite_difference"), tmp_path, rows(2))
        model = make(lora_config=LORA, meta_gradient="finite_difference")
        found, _ = gradients(model, tmp_path, rows(2), **options)
        assert [layer.gradient_checkpointing for layer in layers_of(model)] == [True, False]
        close(found, plain)

    @pytest.mark.parametrize(
        ("meta_gradient", "lora_phase", "checkpointing"),
        [("first_order", "both", False), ("finite_difference", "write", False), ("finite_difference", "both", True)],
    )
    def test_compiling_changes_nothing(self, tmp_path, meta_gradient, lora_phase, checkpointing):
        lora = LORA | {"init_lora_weights": False}
        config = {"lora_config": lora, "meta_gradient": meta_gradient, "lora_phase": lora_phase}
        config["finite_difference_step"] = 0.1  # a long step leaves little rounding error
        plain, one = gradients(make(backbone=tiny(num_hidden_layers=1), **config), tmp_path, rows(2))
        model = make(backbone=tiny(num_hidden_layers=1), **config)
        torch._dynamo.reset()
        options = {"torch_compile_backend": "aot_eager", "gradient_checkpointing": checkpointing}
        compiled, two = gradients(model, tmp_path / "compiled", rows(2), **options)
        assert type(two.model_wrapped) is type(model)
        assert all(layer._compiled_call_impl is None for layer in layers_of(model))  # as it was found
        close(compiled, plain)
        assert logs(one, "loss") == pytest.approx(logs(two, "loss"), rel=1e-5)
        two.save_model(str(tmp_path / "saved"))
        load_weights(make(backbone=tiny(num_hidden_layers=1), **config), tmp_path / "saved")

    def test_training_in_bf16(self, tmp_path):
        run = trainer(make(lora_config=LORA), tmp_path, rows(4), rows(3), max_steps=2, bf16=True)
        run.train()
        assert all(math.isfinite(loss) for loss in logs(run, "loss"))
        assert math.isfinite(run.evaluate()["eval_loss"])


class TestResume:
    @pytest.mark.parametrize("trained", ["lora", "backbone"])
    @pytest.mark.parametrize("ready", [False, True])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path, trained, ready):
        """With dropout, both in the backbone and in the LoRA."""
        config = {
            "lora": {"lora_config": LORA | {"lora_dropout": 0.3}}, "backbone": {"train_backbone": True}
        }[trained]  # fmt: skip

        def run(path, **options):
            model = make(backbone=tiny(attention_dropout=0.2), learn_write_lr="scalar", **config)
            data = RowBatches(rows(7), GradMemCollator(tiny_tokenizer()), contexts=2) if ready else rows(7)
            return trainer(
                model, path, data, max_steps=6, save_strategy="steps", save_steps=3, write_steps=[1, 2, 3],
                gradient_accumulation_steps=2, lr_scheduler_type="cosine", **options,
            )  # fmt: skip

        whole = run(tmp_path / "whole")
        whole.train()
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
        resumed = run(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=True)
        assert same(weights(resumed.model), weights(whole.model))
        for name in ("loss", "learning_rate", "write_steps", "grad_norm"):
            assert logs(resumed, name) == logs(whole, name)

    def test_the_trained_length_includes_steps_before_the_checkpoint(self, tmp_path):
        train = [row(i, 0) | {"context": tiny_text(n)} for i, n in enumerate((30, 30, 30, 30, 5, 5, 5, 5))]
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "sequential"}
        trainer(make(), tmp_path, train, **options).train()
        resumed = trainer(make(score_calibration=(1.0, 0.0)), tmp_path, train, **options)
        with pytest.raises(FileNotFoundError):
            resumed.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
        assert resumed.config.score_calibration == (1.0, 0.0), "no weight has changed"
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.config.trained_length == 30

    def test_an_incomplete_checkpoint_is_skipped(self, tmp_path):
        run = trainer(make(), tmp_path, rows(4), max_steps=2, save_strategy="steps", save_steps=1)
        run.train()
        (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
        again = trainer(make(), tmp_path, rows(4), max_steps=2, save_strategy="steps", save_steps=1)
        again.train(resume_from_checkpoint=True)
        assert same(weights(again.model), weights(run.model))

    def test_resuming_without_a_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no checkpoint to resume from.*trainer\.has_checkpoint\(\)"):
            trainer(make(), tmp_path, rows(2)).train(resume_from_checkpoint=True)
        with pytest.raises(FileNotFoundError, match="no adapter checkpoint"):
            trainer(make(), tmp_path, rows(2)).train(resume_from_checkpoint=str(tmp_path / "none"))


class TestCheckpoints:
    @pytest.fixture
    def reference(self, tmp_path):
        tiny().save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # untied and tied
    @pytest.mark.parametrize("config", [{"lora_config": LORA}, {"train_backbone": True}], ids=["lora", "backbone"])
    def test_checkpoints_can_be_opened(self, tmp_path, architecture, config):
        model = make(architecture, write_head=True, **config)
        run = trainer(model, tmp_path, rows(4), save_strategy="steps", save_steps=1, max_steps=2)
        run.train()
        run.save_model()
        batch = GradMemCollator(tiny_tokenizer())(rows(2, 7))
        inputs = {name: batch[name] for name in ("context_input_ids", "context_attention_mask", "input_ids")}
        with torch.no_grad():
            expected = model.eval()(**inputs).logits
        own = None if config.get("train_backbone") else tiny(architecture)
        for path in (tmp_path, tmp_path / "checkpoint-2"):
            loaded, _ = load_checkpoint(path, backbone=own and tiny(architecture))
            with torch.no_grad():
                assert torch.equal(loaded(**inputs).logits, expected)
        names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
        assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json"}
        assert not any(name.startswith(".") for name in names)
        assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint-1", "checkpoint-2", "adapter_config.json"}

        fresh = make(architecture, write_head=True, seed=5, **config)
        load_weights(fresh, tmp_path / "checkpoint-2")
        with torch.no_grad():
            assert torch.equal(fresh.eval()(**inputs).logits, expected)
        assert weights(fresh).keys() == weights(model).keys()

    def test_an_adapter_of_another_name_is_saved(self, tmp_path):
        model = make(lora_config=LORA)
        model.add_adapter("other", GradMemConfig(num_memory_tokens=2, lora_config=LORA | {"init_lora_weights": False}))
        model.set_adapter("other")
        run = trainer(model, tmp_path, rows(2), rows(2), max_steps=1, save_strategy="steps", save_steps=1)
        run.train()
        loaded, _ = load_checkpoint(tmp_path / "checkpoint-1", backbone=tiny(), is_trainable=True)
        trained = {name.replace(".other", ".default"): weight for name, weight in weights(model).items()}
        assert same(trained, weights(loaded))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        load_weights(model, tmp_path / "checkpoint-1")
        assert same(trained, {name.replace(".other", ".default"): weight for name, weight in weights(model).items()})

    def test_saving_again_replaces_the_checkpoint(self, tmp_path):
        run = trainer(make(train_backbone=True), tmp_path, rows(2), max_steps=1)
        run.save_model()
        run.train()
        run.save_model()
        loaded, _ = load_checkpoint(tmp_path)
        assert torch.equal(loaded.get_base_model().lm_head.weight, run.model.get_base_model().lm_head.weight)
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"num_memory_tokens": 3},
                r"gradmem_memory.*has shape \(2, 32\) in the checkpoint and \(3, 32\) in the model",
            ),
            ({"write_head": True}, r"gradmem_write_head.*is missing"),
            (
                {"lora_config": LORA | {"r": 3}},
                r"lora_A.*has shape \(2, 48\) in the checkpoint and \(3, 48\) in the model",
            ),
            ({"lora_config": None}, r"lora_A.*is unknown"),
            ({"backbone": {"hidden_size": 16}}, r"\(2, 32\) in the checkpoint and \(2, 16\) in the model"),
        ],
    )
    def test_an_adapter_of_another_shape_is_refused(self, tmp_path, config, message):
        run = trainer(make(lora_config=LORA), tmp_path, rows(2), save_strategy="steps", save_steps=1, max_steps=1)
        run.train()
        backbone = tiny(**config.pop("backbone", {}))
        other = make(backbone=backbone, **{"lora_config": LORA} | config)
        before = weights(other)
        with pytest.raises(ValueError, match=f"(?s)does not match the model: tensor .*{message}"):
            trainer(other, tmp_path, rows(2)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert same(weights(other), before)

    def test_a_backbone_of_another_shape_is_refused(self, tmp_path):
        trainer(make(train_backbone=True), tmp_path, rows(2)).save_model()
        other = make(backbone=tiny(intermediate_size=40), train_backbone=True)
        with pytest.raises(
            ValueError, match=r"down_proj.*has shape \(32, 48\) in the checkpoint and \(32, 40\) in the model"
        ):
            load_weights(other, tmp_path)
        trainer(make(), tmp_path / "alone", rows(2)).save_model()
        with pytest.raises(FileNotFoundError, match="holds only an adapter"):
            load_weights(make(train_backbone=True), tmp_path / "alone")

    def test_non_finite_weights_are_not_saved(self, tmp_path):
        model = make()
        with torch.no_grad():
            model.base_model.slots.gradmem_memory["default"][0, 0] = torch.nan
        with pytest.raises(
            TrainingDiverged, match=r"gradmem_memory.* is not finite after step 0, so nothing was saved"
        ):
            trainer(model, tmp_path, rows(2)).save_model(str(tmp_path / "saved"))
        assert not (tmp_path / "saved").exists()


class Poison(TrainerCallback):
    """Makes the loss NaN from a given step on, by way of the input embeddings."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_base_model().get_input_embeddings().weight.fill_(torch.nan)


class TestDivergence:
    @pytest.mark.parametrize("saved", [True, False])
    def test_a_non_finite_loss_stops_training(self, tmp_path, saved):
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")  # of an earlier run
        model = make()
        run = trainer(
            model, tmp_path, rows(4), callbacks=[Poison(2)], max_steps=4, save_steps=1,
            save_strategy="steps" if saved else "no",
        )  # fmt: skip
        where = "The last good checkpoint is .*checkpoint-2" if saved else "There is no checkpoint yet"
        with pytest.raises(TrainingDiverged, match=rf"loss is not finite in step 3\..*{where}.*lower learning rate"):
            run.train()
        assert all(weight.isfinite().all() for weight in weights(model).values())
        if saved:
            loaded, _ = load_checkpoint(tmp_path / "checkpoint-2", backbone=tiny())
            assert same(weights(model), {name: p for name, p in loaded.named_parameters() if name in weights(model)})

    def test_a_non_finite_gradient_stops_training(self, tmp_path):
        model = make()
        slots = model.base_model.slots.gradmem_memory["default"]
        slots.register_hook(lambda gradient: gradient * torch.inf)
        before = weights(model)
        with pytest.raises(TrainingDiverged, match="gradient is not finite in step 1"):
            trainer(model, tmp_path, rows(2)).train()
        assert same(weights(model), before)

    def test_a_gradient_scaler_may_skip_overflowing_steps(self, tmp_path):
        """As with fp16: a step whose gradient overflows is skipped, and training continues."""
        found = {}
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
            model = make()
            run = trainer(model, tmp_path, rows(4), max_steps=2, train_sampling_strategy="sequential")
            run.accelerator.scaler = scaler
            if scaler is not None:
                factors = iter([torch.inf, 1.0])
                slots = model.base_model.slots.gradmem_memory["default"]
                slots.register_hook(lambda gradient, factors=factors: gradient * next(factors))
            run.train()
            found[scaler is None] = run
        scaled, plain = found[False], found[True]
        assert scaled.state.global_step == 2
        assert scaled.accelerator.scaler.get_scale() == 512
        assert all(weight.isfinite().all() for weight in weights(scaled.model).values())
        # The step that counts has other rows than the first one without a scaler, but the same weights.
        assert 0 < logs(scaled, "memory_grad_norm")[0] < 10 * logs(plain, "memory_grad_norm")[0]
        assert len(logs(scaled, "memory_grad_norm")) == 1

    def test_rows_are_grouped_by_the_lengths_of_their_contexts(self, tmp_path):
        """Rows have no `input_ids`, which Transformers' sampler looks for."""
        data = [row(0, 0) | {"context": tiny_text(2 if i % 2 else 40, i)} for i in range(64)]
        run = trainer(make(), tmp_path, data, train_sampling_strategy="group_by_length", max_steps=2)
        run.train()
        lengths = [len(data[i]["context"]) > 60 for i in run._get_train_sampler()]
        pairs = list(zip(lengths[::2], lengths[1::2], strict=True))
        assert sum(one == other for one, other in pairs) > 28  # by chance 16
        with pytest.raises(ValueError, match=r"batch_rebalance.*Use 'group_by_length'"):
            trainer(make(), tmp_path, data, train_sampling_strategy="batch_rebalance")

    def test_an_unknown_field_is_refused_with_a_suggestion(self, tmp_path):
        with pytest.raises(
            TypeError, match=r"GradMemTrainingArguments has no field max_step\. Did you mean max_steps\?"
        ):
            GradMemTrainingArguments(str(tmp_path), max_step=1)

    def test_divergence_is_also_found_with_plain_training_arguments(self, tmp_path):
        args = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, remove_unused_columns=False)
        run = GradMemTrainer(
            make(), args, train_dataset=rows(2), processing_class=tiny_tokenizer(), callbacks=[Poison(1)]
        )
        with pytest.raises(TrainingDiverged, match="step 2"):
            run.train()


class TestEvaluation:
    def test_metrics_equal_those_computed_by_hand(self, tmp_path):
        """The model's own answer is a reference of some queries and not of others."""
        model, tokenizer = make(lora_config=LORA | {"lora_dropout": 0.5}), tiny_tokenizer()
        data = rows(5, queries=3)
        model.eval()
        pipeline = GradMemPipeline(model, tokenizer)
        states = [pipeline.write(row["context"], steps=3) for row in data]
        found = {"exact": [], "length": []}
        for i, (row, state) in enumerate(zip(data, states, strict=True)):
            row["answers"] = []
            for j, query in enumerate(row["queries"]):
                (answer,) = pipeline.generate(query, memory=state, max_new_tokens=6, do_sample=False)
                right = (i + j) % 3 == 0
                row["answers"].append(["nothing", answer] if right else [answer + " w1"])
                found["exact"].append(float(right))
                found["length"].append(len(answer.split()))
        run = trainer(
            model, tmp_path, evaluation=data, eval_write_steps=3, generation_max_new_tokens=6,
            score=lambda answer, references: {
                "exact": float(answer in references), "length": float(len(answer.split())),
            },
        )  # fmt: skip
        metrics = run.evaluate()
        for name, values in found.items():
            assert metrics[f"eval_{name}"] == pytest.approx(sum(values) / len(values))
        batch = GradMemCollator(tokenizer)(data)
        inputs = {name: batch[name] for name in batch if not name.startswith("query_") and name != "targets"}
        with torch.no_grad():
            expected = model.eval()(**inputs, write_steps=3)
        assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
        assert metrics["eval_target_loss"] == pytest.approx(expected.target_loss.item(), rel=1e-4)
        assert metrics["eval_last_write_loss"] == pytest.approx(expected.write_losses[:, -1].mean().item(), rel=1e-4)
        assert "eval_exact_match" not in metrics

    def test_the_batch_size_makes_no_difference(self, tmp_path):
        model = make(lora_config=LORA)
        one, four = (
            trainer(model, tmp_path, evaluation=rows(5, queries=3), per_device_eval_batch_size=size).evaluate()
            for size in (1, 4)
        )
        for name in ("eval_loss", "eval_exact_match", "eval_f1", "eval_memory_norm"):
            assert one[name] == pytest.approx(four[name], rel=1e-4)

    def test_trained_answers_match_their_references(self, tmp_path):
        data = [row | {"answers": [row["target"].upper(), "x"]} for row in rows(3)]
        run = trainer(
            make(train_backbone=True), tmp_path, data, data, max_steps=30, per_device_train_batch_size=3,
            learning_rate=3e-3, eval_strategy="steps", eval_steps=30,
        )  # fmt: skip
        before = run.evaluate()
        run.train()
        assert before["eval_exact_match"] < 1
        assert logs(run, "eval_exact_match")[-1] == 1
        assert logs(run, "eval_f1")[-1] == 1

    def test_evaluation_without_generation(self, tmp_path):
        metrics = trainer(make(), tmp_path, evaluation=rows(3), predict_with_generate=False).evaluate()
        assert "eval_loss" in metrics
        assert "eval_exact_match" not in metrics

    @pytest.mark.parametrize("name", ["loss", "target_loss", "tokens"])
    def test_a_score_with_a_reserved_name_is_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"must not be named {name}"):
            trainer(make(), tmp_path, evaluation=rows(2), score=lambda *_: {name: 1.0}).evaluate()

    def test_scores_with_changing_names_are_refused(self, tmp_path):
        names = iter("abc")
        with pytest.raises(ValueError, match="the same names"):
            trainer(make(), tmp_path, evaluation=rows(2), score=lambda *_: {next(names): 1.0}).evaluate()

    def test_memory_is_not_pinned_for_a_cpu(self, tmp_path):
        assert arguments(tmp_path, use_cpu=False).dataloader_pin_memory == torch.cuda.is_available()

    def test_evaluation_without_rows_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="has no rows"):
            trainer(make(), tmp_path).evaluate([])

    def test_several_datasets_are_evaluated(self, tmp_path):
        metrics = trainer(make(), tmp_path, evaluation={"one": rows(3), "two": rows(3, 9)}).evaluate()
        assert {"eval_one_loss", "eval_two_loss", "eval_one_exact_match", "eval_two_f1"} <= metrics.keys()

    def test_best_model_and_early_stopping(self, tmp_path):
        model = make(lora_config=LORA)
        values = iter([0.1, 0.5, 0.2, 0.3, 0.4])
        current = [0.0]

        class Next(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                current[0] = next(values)

        run = trainer(
            model, tmp_path, rows(4), rows(2), max_steps=5, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, load_best_model_at_end=True, metric_for_best_model="exact_match", greater_is_better=True,
            callbacks=[Next(), EarlyStoppingCallback(2)], score=lambda *_: {"exact_match": current[0]},
        )  # fmt: skip
        run.train()
        assert run.state.global_step == 4  # two evaluations without a better one
        assert run.state.best_model_checkpoint.endswith("checkpoint-2")
        best, _ = load_checkpoint(tmp_path / "checkpoint-2", backbone=tiny(), is_trainable=True)
        assert same(weights(model), weights(best))

    def test_answers_may_be_longer_than_the_longest_target(self, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(rows(3))

        run = trainer(make(), tmp_path)
        run.evaluate(rows(3))
        assert run._new_tokens == 3 + 1 + 8
        with pytest.raises(ValueError, match="Set generation_max_new_tokens"):
            run.evaluate(Stream())
        streamed = trainer(make(), tmp_path, generation_max_new_tokens=12).evaluate(Stream())
        assert streamed["eval_loss"] == pytest.approx(trainer(make(), tmp_path).evaluate(rows(3))["eval_loss"])


class TestArguments:
    def test_unused_columns_are_kept(self, tmp_path):
        args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
        with pytest.warns(UserWarning, match="so it is set to False"):
            run = GradMemTrainer(make(), args, train_dataset=rows(4), processing_class=tiny_tokenizer())
        assert run.args.remove_unused_columns is False
        run.train()
        assert logs(run, "train_loss")

    def test_a_model_without_a_trainable_adapter_is_refused(self, tmp_path):
        with pytest.raises(TypeError, match="needs a model with an active GradMem adapter, got LlamaForCausalLM"):
            trainer(tiny(), tmp_path)
        with pytest.raises(TypeError, match="needs a model with an active GradMem adapter, got PeftModel"):
            trainer(get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])), tmp_path)
        frozen = make()
        frozen.requires_grad_(False)
        with pytest.raises(ValueError, match="is_trainable=True"):
            trainer(frozen, tmp_path)

    def test_a_missing_or_unsuitable_tokenizer_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="processing_class=tokenizer"):
            GradMemTrainer(make(), arguments(tmp_path))
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # and the model was not resized
        with pytest.raises(ValueError, match="pad token has id 61, but the model knows 0 to 60"):
            GradMemTrainer(make(), arguments(tmp_path), train_dataset=rows(2), processing_class=tokenizer)

    @pytest.mark.parametrize(
        ("options", "config", "message"),
        [
            ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
            ({"include_for_metrics": ["loss"]}, {}, "is not supported: evaluation sums the loss"),
            ({"torch_compile": True}, {}, "cannot be differentiated twice"),
            ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches"),
            ({"max_minutes": 1, "warmup_steps": 0.1}, {}, "Pass a number of steps"),
            ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}, "use_reentrant"),
        ],
    )
    def test_unsupported_options_are_refused(self, tmp_path, options, config, message):
        with pytest.raises(ValueError, match=message):
            trainer(make(**config), tmp_path, rows(2), **options)

    @pytest.mark.parametrize("wrong", [None, {"output_dir": "runs"}])
    def test_missing_or_invalid_arguments_are_refused(self, wrong):
        with pytest.raises(TypeError, match="args must be training arguments, such as GradMemTrainingArguments"):
            GradMemTrainer(make(), wrong, processing_class=tiny_tokenizer())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"write_steps": [-1]}, ValueError, "Every one of write_steps must be at least 0"),
            ({"write_steps": [1.5]}, TypeError, "Every one of write_steps must be an integer"),
            ({"write_steps": []}, TypeError, "write_steps must be a list of integers"),
            ({"max_minutes": "10"}, TypeError, "max_minutes must be a number"),
            ({"decay_share": "x"}, TypeError, "decay_share must be a number"),
            ({"write_lr_factor": None}, TypeError, "write_lr_factor must not be None"),
            ({"queries_per_context": None}, TypeError, "queries_per_context must not be None"),
            ({"eval_write_steps": -1}, ValueError, "eval_write_steps must be at least 0"),
            ({"decay_share": 2.0}, ValueError, "decay_share must be between 0 and 1"),
            ({"max_minutes": 0}, ValueError, "max_minutes must be positive"),
            ({"distillation_temperature": 0.0}, ValueError, "distillation_temperature must be positive"),
            ({"max_minutes": 1, "lr_scheduler_type": "cosine"}, ValueError, "its own schedule"),
            ({"generation_max_new_tokens": 0}, ValueError, "generation_max_new_tokens must be at least 1"),
            ({"max_minutes": float("nan")}, ValueError, "max_minutes must be finite"),
            ({"learning_rate": float("inf")}, ValueError, "learning_rate must be finite"),
            ({"learning_rate": -1}, ValueError, "learning_rate must be at least 0"),
            ({"weight_decay": "x"}, TypeError, "weight_decay must be a number"),
            ({"warmup_steps": "x"}, TypeError, "warmup_steps must be a number"),
            ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size must be at least 1"),
            ({"bf16": "yes"}, TypeError, "bf16 must be True or False"),
            ({"report_to": "nobody"}, ValueError, "nobody is not supported"),
            ({"report_to": "dvclive"}, ImportError, "report_to names dvclive, but its package"),
        ],
    )
    def test_invalid_values_are_refused(self, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            arguments(tmp_path, **options)

    def test_the_error_for_a_missing_tensorboard_says_how_to_install_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr("gradmem_adapter.training.arguments.get_available_reporting_integrations", list)
        with pytest.raises(ImportError, match=r'pip install "gradmem-adapter\[train\]", or leave it out of report_to'):
            arguments(tmp_path, report_to="tensorboard")

    def test_training_without_rows_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="train_dataset has no rows"):
            trainer(make(), tmp_path, [])

    @pytest.mark.parametrize("several", [False, True])
    def test_rows_in_a_list_are_checked_before_training(self, tmp_path, several):
        bad = rows(3)
        bad[2]["target"] = ""
        with pytest.raises(ValueError, match="Row 2 of train_dataset has an empty target"):
            trainer(make(), tmp_path, bad)
        with pytest.raises(ValueError, match="Row 2 of eval_dataset has an empty target"):
            trainer(make(), tmp_path, rows(3), {"easy": rows(1), "hard": bad} if several else bad)

    def test_the_collators_limits_follow_from_the_positions(self, tmp_path):
        run = trainer(make(num_control_tokens=1), tmp_path, (rows(1)[0] | {"context": tiny_text(93)},))
        assert run.data_collator.max_context_length == run.data_collator.max_query_length == 96 - 2 - 2
        with pytest.raises(ValueError, match=r"Row 0 of .*: the context of 93 tokens is longer than the 92 that fit"):
            run.train()

    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize(
        ("field", "text", "wrong"),
        [("context", tiny_text(95), "the context of 95 tokens is longer than the 94"),
         ("query", tiny_text(95), "query and target of 97 tokens is longer than the 94"),
         ("context", " ", "the context has no tokens"),
         ("target", " ", "the target has no tokens")],
    )  # fmt: skip
    def test_rows_in_a_list_that_do_not_fit_are_refused_before_training(self, tmp_path, field, text, wrong, several):
        bad = [*rows(2), rows(1)[0] | {field: text}]
        with pytest.raises(ValueError, match=f"train_dataset: Row 2: {wrong}"):
            trainer(make(), tmp_path, bad)
        name = "eval_dataset 'hard'" if several else "eval_dataset"
        with pytest.raises(ValueError, match=f"{name}: Row 2: {wrong}"):
            trainer(make(), tmp_path, rows(2), {"easy": rows(1), "hard": bad} if several else bad)

    def test_the_callers_collator_is_not_changed(self, tmp_path):
        collator = GradMemCollator(tiny_tokenizer(), max_query_length=20)
        run = GradMemTrainer(make(), arguments(tmp_path), collator, processing_class=tiny_tokenizer())
        assert (run.data_collator.max_context_length, run.data_collator.max_query_length) == (94, 20)
        assert collator.max_context_length is None

    def test_a_collator_with_another_query_format_is_refused(self, tmp_path):
        collator = GradMemCollator(tiny_tokenizer())
        with pytest.raises(ValueError, match="would differ"):
            GradMemTrainer(make(query_format="chat"), arguments(tmp_path), collator, processing_class=tiny_tokenizer())

    def test_a_batch_without_a_context_is_refused(self, tmp_path):
        def collate(batch):
            return {"input_ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)}

        run = GradMemTrainer(make(), arguments(tmp_path), collate, rows(2), processing_class=tiny_tokenizer())
        with pytest.raises(ValueError, match="needs context_input_ids and labels"):
            run.train()


def test_the_trainer_state_holds_what_was_logged(tmp_path):
    run = trainer(make(), tmp_path, rows(4), save_strategy="steps", save_steps=2)
    run.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert {"target_loss", "memory_norm", "memory_grad_norm"} <= state["log_history"][0].keys()
