"""Recipes, training on key-value retrieval and its baselines, on tiny models."""

import copy
import io
import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from gradmem_adapter import load_checkpoint
from gradmem_adapter.cli import app
from gradmem_adapter.recipes import load_recipe
from gradmem_adapter.tasks.kv_recipe import METHODS, KVRecipe
from gradmem_adapter.tasks.kv_retrieval import KVRetrieval
from gradmem_adapter.tasks.kv_training import load_kv, save_kv, train_kv
from gradmem_adapter.training import TrainingDiverged
from gradmem_adapter.training.graphed_step import GraphedStep
from gradmem_adapter.training.optimizers import Optimizers, layer_matrices
from gradmem_adapter.training.speed import compiled_layers, maskless_attention
from gradmem_adapter.training_runs import train

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("kv_*.yaml"))
MEMORY = {
    "num_memory_tokens": 4, "learn_write_lr": "scalar", "write_head": True, "reconstruction_weight": 0.2,
    "meta_gradient": "finite_difference",
}  # fmt: skip


def recipe(method="gradmem", steps=8, **fields):
    memory = {} if method == "full_context" else MEMORY
    return KVRecipe.of(
        {
            "method": method,
            "backbone": {"layers": 1, "width": 32, "heads": 2},
            "memory": memory,
            "warmup_steps": 4,
            "stages": [
                {"steps": 4, "mix": [{"max_pairs": 2, "contexts": 8, "queries": 2, "write_steps": [1, 2]}]},
                {"steps": steps - 4, "mix": [
                    {"max_pairs": 4, "min_pairs": 2, "contexts": 4, "queries": 2, "write_steps": [2], "share": 3},
                    {"max_pairs": 2, "contexts": 4, "queries": 2},
                ]},
            ],
        } | fields
    )  # fmt: skip


def run(plan, output, **options):
    model = plan.build()
    done = train_kv(model, plan, output, device="cpu", log_every=2, save_seconds=0, **options)
    return model, done


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_equals_uninterrupted(method, tmp_path):
    whole, done = run(recipe(method), tmp_path / "whole")
    assert done
    _, done = run(recipe(method), tmp_path / "parts", stop=lambda now: now.step >= 4)
    assert not done
    parts, done = run(recipe(method), tmp_path / "parts")
    assert done
    start = recipe(method).build().state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in whole.state_dict().items())


def test_training_gradmem_lowers_the_loss(tmp_path):
    losses = []
    plan = recipe(
        steps=64, stages=[{"steps": 60, "lr": 0.003, "mix": [{"max_pairs": 2, "contexts": 32, "queries": 2}]}]
    )
    run(plan, tmp_path, callback=lambda now: losses.extend(v["target_loss"] for v in now.means.values()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_saved_models_come_back(method, tmp_path):
    plan = recipe(method)
    model = plan.build().eval()
    save_kv(model, plan, tmp_path / "model")
    back, same = load_kv(tmp_path / "model")
    batch = KVRetrieval(3, 2).sample(3, 2, seed=0).as_dict()
    with torch.no_grad():
        torch.testing.assert_close(back(**batch).logits, model(**batch).logits)
    assert same == plan
    if method == "gradmem":
        load_checkpoint(tmp_path / "model")


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_named(tmp_path):
    plan = recipe(steps=20)
    model = plan.build()

    def poison(now):
        if now.step == 6:
            with torch.no_grad():
                model.get_base_model().lm_head.weight.fill_(math.nan)

    with pytest.raises(TrainingDiverged, match=r"step 8 .*of step 6, is in .*last"):
        train_kv(model, plan, tmp_path, device="cpu", log_every=2, save_seconds=0, callback=poison)


def test_a_state_of_another_shape_is_refused(tmp_path):
    run(recipe(), tmp_path)
    with pytest.raises(ValueError, match=r"of another model: tensor .* has shape \(67, 32\) there and \(67, 64\) here"):
        run(recipe(backbone={"layers": 1, "width": 64, "heads": 2}), tmp_path)


def test_the_rate_warms_up_stays_and_decays():
    plan = recipe(steps=100, decay_share=0.5, stages=[{"steps": 100, "lr": 0.01, "mix": [
        {"max_pairs": 2, "contexts": 1, "queries": 1}]}])  # fmt: skip
    rates = [plan.lr_at(step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.0025)
    assert rates[10] == rates[50] == 0.01
    assert rates[99] == pytest.approx(0.0005)
    assert rates[60:] == sorted(rates[60:], reverse=True)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_shipped_recipes_are_sound(file):
    plan = load_recipe(file)
    assert isinstance(plan, KVRecipe)
    replace(plan, init_from=None).build()
    assert {plan.stage_at(step) for step in range(plan.steps)} == set(plan.stages)


def test_the_shipped_weights_were_trained_by_the_shipped_recipe():
    root = Path(__file__).parent.parent
    made = json.loads((root / "checkpoints" / "kv-retrieval" / "recipe.json").read_text(encoding="utf-8"))
    recipe = load_recipe(root / "examples" / "kv_retrieval_longer.yaml")
    assert replace(KVRecipe.of(made), minutes=None) == recipe, "it was timed by the clock, and the recipe has its steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"stages": []}, "at least one stage"),
        ({"keep_write_lrs": 2}, "number of learned write rates, 0, got 2"),
        ({"keep_write_lrs": 1, "method": "forward_memory"}, "got 1 with method 'forward_memory'"),
        ({"step": 3}, "step"),
        ({"task": "other"}, "task must be one of kv_retrieval, answers, rows"),
    ],
)
def test_recipes_that_cannot_work_name_the_field(change, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    content = {"task": "kv_retrieval", "stages": [{"steps": 1, "mix": [{"max_pairs": 2, "contexts": 1, "queries": 1}]}]}
    file.write_text(yaml.safe_dump(content | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


def test_settings_take_the_place_of_fields():
    plan = load_recipe(EXAMPLES[0], ["seed=3", "memory.num_memory_tokens=2", "memory.write_steps=4"])
    assert (plan.seed, plan.memory["num_memory_tokens"], plan.memory["write_steps"]) == (3, 2, 4)
    for setting, message in (("seed", "field=value"), ("=1", "field=value"), ("stages.x=1", "no fields of its own")):
        with pytest.raises(ValueError, match=message):
            load_recipe(EXAMPLES[0], [setting])


def test_write_steps_of_the_recipe_take_the_place_of_those_of_its_stages():
    plan, fixed = recipe(steps=40), recipe(steps=40, write_steps=[3])
    assert {plan.kind_at(step).write_steps for step in range(40)} == {1, 2}
    assert {fixed.kind_at(step).write_steps for step in range(40)} == {3}
    assert (plan.trained_steps, fixed.trained_steps) == ("1-2", "3")


class TestCommands:
    def arguments(self, tmp_path, *more):
        file = tmp_path / "recipe.yaml"
        stage = {"steps": 4, "mix": [{"max_pairs": 2, "contexts": 4, "queries": 2}]}
        content = {"task": "kv_retrieval", "backbone": {"layers": 1, "width": 16, "heads": 2}, "stages": [stage]}
        content["memory"] = MEMORY
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return ["train", str(file), "--output", str(tmp_path / "run"), "--device", "cpu", *more]

    def test_train(self, tmp_path):
        result = CliRunner().invoke(app, self.arguments(tmp_path))
        assert result.exit_code == 0, result.output
        assert "GradMem trained with K=1, 5 steps" in " ".join(result.output.split())
        load_checkpoint(tmp_path / "run" / "checkpoint")

    def test_train_goes_on_where_it_was_stopped(self, tmp_path):
        arguments = self.arguments(tmp_path, "--set", "stages.0.steps=1")
        assert CliRunner().invoke(app, arguments).exit_code == 2  # a list has no fields to set
        result = CliRunner().invoke(app, self.arguments(tmp_path, "--max-minutes", "1e-9"))
        assert result.exit_code == 0, result.output

    def test_bad_input(self, tmp_path):
        for more, message in (
            (["--set", "method=magic"], "method must be one of"),
            (["--max-minutes", "0"], "max_minutes must be positive"),
            (["--set", "memory.num_memory_tokens=0"], "num_memory_tokens must be at least 1"),
        ):
            result = CliRunner().invoke(app, self.arguments(tmp_path, *more))
            assert result.exit_code == 2, result.output
            assert message in " ".join(result.stderr.split())


class TestSpeed:
    def test_maskless_attention_changes_nothing_for_right_padded_contexts(self):
        model = recipe().build().eval()
        batch = KVRetrieval(4, 2).sample(3, 2, seed=0).as_dict()
        expected = model(**batch)
        with maskless_attention(model):
            actual = model(**batch)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert model.config._attn_implementation == "sdpa"

    def test_layers_are_compiled_inside_alone(self):
        model = recipe().build()
        layer = model.get_base_model().model.layers[0]
        with compiled_layers(model, True):
            assert layer._compiled_call_impl is not None
        assert layer._compiled_call_impl is None

    def test_graphed_step_is_adamw_with_clipping(self):
        """On the CPU, where nothing is captured."""
        torch.manual_seed(0)
        weight, reference = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        data = torch.tensor([1.0, -2.0, 30.0])
        step = GraphedStep(lambda kind: {"loss": kind * (weight * data).square().sum()}, [weight], max_grad_norm=0.5)
        optimizer = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0)
        for lr, kind in ((0.1, 1), (0.05, 2), (0.1, 1)):
            step(kind, lr)
            optimizer.zero_grad()
            (kind * (reference * data).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_([reference], 0.5)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        torch.testing.assert_close(weight, reference)
        means = step.means()
        assert set(means) == {1, 2}
        assert set(means[1]) == {"loss", "grad_norm"}
        assert step.means() == {}

    def test_kinds_may_log_different_scalars(self):
        """Without a write step there is no write loss."""
        weight = torch.nn.Parameter(torch.ones(3))

        def loss(kind):
            more = {"write_loss": torch.tensor(4.0)} if kind else {}
            return {"loss": weight.square().sum(), **more, "norm": weight.detach().norm()}

        step = GraphedStep(loss, [weight], max_grad_norm=1.0)
        for kind in (0, 1, 0):
            step(kind, 0.0)
        means = step.means()
        assert set(means[0]) == {"loss", "norm", "grad_norm"}
        assert set(means[1]) == {"loss", "write_loss", "norm", "grad_norm"}
        assert means[1]["write_loss"] == 4
        assert means[0]["norm"] == means[1]["norm"] == pytest.approx(3**0.5)


class TestOptimizers:
    """Against PyTorch's own, with rates as plain numbers."""

    @staticmethod
    def parameters():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((3,), (4,), (4, 6), (6, 4))]

    @staticmethod
    def ours(vector, fast, *matrices, **options):
        return Optimizers([vector, fast, *matrices], matrices, factors={fast: 10.0}, muon_rate=3.0, **options)

    @staticmethod
    def step(parameters, seed, optimizers):
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()

    @pytest.mark.parametrize("decay", [0.0, 0.3])
    def test_rates(self, decay):
        mine, theirs = self.parameters(), self.parameters()
        optimizers = self.ours(*mine, weight_decay=decay)
        adamw = torch.optim.AdamW([{"params": [theirs[0]]}, {"params": [theirs[1]]}], weight_decay=decay)
        muon = torch.optim.Muon(theirs[2:], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        for seed, lr in enumerate((0.1, 0.02, 0.05)):
            optimizers.lr.fill_(lr)
            adamw.param_groups[0]["lr"], adamw.param_groups[1]["lr"] = lr, 10 * lr
            muon.param_groups[0]["lr"] = 3 * lr
            self.step(mine, seed, [optimizers])
            self.step(theirs, seed, [adamw, muon])
        for parameter, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)

    def test_going_on_from_a_state_equals_going_on(self):
        whole, parts = self.parameters(), self.parameters()
        first = self.ours(*whole)
        for seed in range(4):
            first.lr.fill_(0.1 / (seed + 1))
            self.step(whole, seed, [first])
        optimizers = self.ours(*parts)
        for seed in range(4):
            if seed == 2:
                state = copy.deepcopy(optimizers.state_dict())
                optimizers = self.ours(*parts)
                optimizers.load_state_dict(state)
            optimizers.lr.fill_(0.1 / (seed + 1))
            self.step(parts, seed, [optimizers])
        for parameter, other in zip(whole, parts, strict=True):
            assert torch.equal(parameter, other)

    def test_muon_trains_the_matrices_inside_the_layers(self):
        model = recipe().build()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {names[id(parameter)].rpartition("layers.0.")[2] for parameter in layer_matrices(model)}
        parts = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"} | dict.fromkeys(
            ("gate", "up", "down"), "mlp"
        )
        assert found == {f"{part}.{name}_proj.weight" for name, part in parts.items()}


def test_training_with_muon_learns_and_goes_on(tmp_path):
    plan = recipe(steps=12, muon_rate=1.0, write_rate_factor=5.0)
    whole, done = run(plan, tmp_path / "whole")
    assert done
    for _ in range(8):
        parts, done = run(plan, tmp_path / "parts", max_seconds=0)
    assert done
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


@pytest.mark.parametrize("method", ["gradmem", "full_context"])
def test_training_goes_on_from_a_checkpoint(method, tmp_path):
    model, _ = run(recipe(method), tmp_path / "first")
    save_kv(model, recipe(method), tmp_path / "checkpoint")
    plan = recipe(method, init_from=str(tmp_path / "checkpoint"), seed=5)
    for name, value in plan.build().state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    with pytest.raises(ValueError, match="shape"):
        replace(plan, backbone={"layers": 1, "width": 16, "heads": 2}).build()


def test_weights_without_factors_of_the_last_steps_are_trained_further_with_them(tmp_path):
    memory = {"num_memory_tokens": 2, "learn_write_lr": "scalar", "num_write_lrs": 2}
    model, _ = run(recipe(memory=memory), tmp_path / "first")
    save_kv(model, recipe(memory=memory), tmp_path / "checkpoint")
    further = recipe(memory=memory | {"write_lr_from_end": True}, init_from=str(tmp_path / "checkpoint")).build()
    ids = KVRetrieval(3).sample(2, 1, seed=0).context_input_ids
    assert torch.equal(further.write(ids, steps=3).vectors, model.write(ids, steps=3).vectors)
    with pytest.raises(ValueError, match="gradmem_log_write_lr"):
        recipe(memory={"num_memory_tokens": 2}, init_from=str(tmp_path / "checkpoint")).build()


def test_a_recipe_can_keep_fewer_write_rates_than_it_trains(tmp_path):
    memory = {"num_memory_tokens": 2, "learn_write_lr": "scalar", "num_write_lrs": 3, "write_lr_from_end": True}
    plan = recipe(memory=memory, keep_write_lrs=2)
    model, _ = run(plan, tmp_path / "run")
    with torch.no_grad():
        for name, rates in model.named_parameters():
            if "write_lr" in name:
                rates += torch.arange(3.0) / 3
    ids = KVRetrieval(3).sample(2, 1, seed=0).context_input_ids
    before = {k: model.write(ids, steps=k).vectors for k in (1, 2, 3)}
    save_kv(model, plan, tmp_path / "checkpoint")
    kept, _ = load_kv(tmp_path / "checkpoint")
    assert kept.peft_config["default"].num_write_lrs == 2
    for k in (1, 2):
        assert torch.equal(kept.write(ids, steps=k).vectors, before[k])
    last = kept.write(ids, steps=2)
    assert not torch.equal(kept.write(ids, steps=3).vectors, before[3])
    assert torch.equal(kept.write(ids, steps=3).vectors, kept.write(ids, steps=1, initial=last).vectors)


def test_a_recipe_by_the_clock_ends_in_time_and_says_how_far_it_came(tmp_path, monkeypatch):
    plan, rates, rate = recipe(steps=100_000, minutes=0.05, decay_share=0.5), [], KVRecipe.lr_at
    monkeypatch.setattr(KVRecipe, "lr_at", lambda *given: rates.append(rate(*given)) or rates[-1])
    monkeypatch.setattr("gradmem_adapter.training_runs.evaluate_pairs", lambda *given, **options: None)
    clock = itertools.count(0, 0.05)  # seconds; a busy machine must not decide
    monkeypatch.setattr("gradmem_adapter.training.graphed_run.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    train(plan, tmp_path, device=torch.device("cpu"), console=Console(file=io.StringIO()))
    made = load_kv(tmp_path / "checkpoint")[1]
    assert 40 < made.steps == len(rates) <= 60
    assert [stage.steps for stage in made.stages] == [4, len(rates) - 4]
    assert rates[-1] < max(rates) / 5


@pytest.mark.parametrize(("step", "left"), [(3, [3]), (4, [4]), (6, [4, 2]), (8, [4, 4])])
def test_the_recipe_of_a_run_that_ended_early(step, left):
    assert [stage.steps for stage in recipe().ended_at(step).stages] == left


def test_a_run_on_another_kind_of_device_goes_on_with_a_warning(tmp_path):
    run(recipe(), tmp_path, stop=lambda now: now.step >= 4)
    state = torch.load(tmp_path / "last" / "state.pt", weights_only=True)
    torch.save(state | {"random": torch.zeros(16, dtype=torch.uint8)}, tmp_path / "last" / "state.pt")  # as on a GPU
    with pytest.warns(UserWarning, match="another kind of device"):
        _, done = run(recipe(), tmp_path)
    assert done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_state_saved(number, tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    plan = recipe("gradmem")
    model = plan.build()
    options = {"device": "cpu", "log_every": 3, "callback": lambda _: os.kill(os.getpid(), number)}
    with pytest.raises(KeyboardInterrupt):
        train_kv(model, plan, tmp_path, **options)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load(tmp_path / "last" / "state.pt", weights_only=True)["step"] in (3, 4)
    parts, done = run(plan, tmp_path)
    assert done
    whole, _ = run(plan, tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_a_run_is_not_gone_on_with_by_another_recipe(tmp_path):
    console = Console(file=io.StringIO())
    options = {"device": torch.device("cpu"), "console": console}
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged"):
        train(recipe("gradmem"), tmp_path, **options)
    (tmp_path / "last" / "state.pt").unlink()
    (tmp_path / "last").rmdir()
    train(recipe("gradmem", seed=1), tmp_path, **options)  # nothing had been trained: another recipe may take its place
    with pytest.raises(ValueError, match="by another recipe: max_grad_norm, seed differ"):
        train(recipe("gradmem", seed=2, max_grad_norm=3.0), tmp_path, **options)
    assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": [{"steps": 0, "mix": [{"max_pairs": 2, "contexts": 1, "queries": 1}]}]},
        {"stages": [{"steps": 1, "mix": []}]},
        {"stages": [{"steps": 1, "mix": [{"max_pairs": 2, "contexts": 0, "queries": 1}]}]},
        {"stages": [{"steps": 1, "mix": [{"max_pairs": 2, "contexts": 1, "queries": 1, "write_steps": [0]}]}]},
        {"write_steps": []},
        {"memory": {"num_memory_token": 3}},
    ],
)
def test_numbers_that_cannot_work_are_refused_by_the_recipe(fields):
    with pytest.raises(ValueError, match=r"validation error|no field"):
        recipe("full_context", **fields)
