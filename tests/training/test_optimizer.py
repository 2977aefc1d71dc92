"""Separate learning rates for write rates, and Muon for matrices inside the layers, against PyTorch's own."""

import copy
import importlib.util

import pytest
import torch
from test_trainer import LORA, logs, make, rows, same, trainer, weights
from tiny import tiny

from gradmem_adapter.training.optimizer import WithMuon, layer_matrices


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((3,), (4,), (4, 6), (6, 4))]


def ours(vector, other, *matrices, decay=0.0):
    return WithMuon(
        torch.optim.AdamW([vector, other], lr=0.1, weight_decay=decay), matrices, lr=0.3, weight_decay=decay
    )


def step(parameters, seed, optimizers):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


class TestWithMuon:
    @pytest.mark.parametrize("decay", [0.0, 0.3])
    def test_it_equals_adamw_and_muon_side_by_side(self, decay):
        mine, theirs = parameters(), parameters()
        both = ours(*mine, decay=decay)
        adamw = torch.optim.AdamW(theirs[:2], weight_decay=decay)
        muon = torch.optim.Muon(theirs[2:], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        for seed, lr in enumerate((0.1, 0.02, 0.05)):
            both.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = lr
            both.param_groups[1]["lr"] = muon.param_groups[0]["lr"] = 3 * lr
            step(mine, seed, [both])
            step(theirs, seed, [adamw, muon])
        assert all(torch.equal(parameter, other) for parameter, other in zip(mine, theirs, strict=True))

    def test_resuming_from_a_state_changes_nothing(self):
        whole, parts = parameters(), parameters()
        first, second = ours(*whole), ours(*parts)
        for seed in range(4):
            if seed == 2:
                state = copy.deepcopy(second.state_dict())
                second = ours(*parts)
                second.load_state_dict(state)
            step(whole, seed, [first])
            step(parts, seed, [second])
        assert all(torch.equal(parameter, other) for parameter, other in zip(whole, parts, strict=True))

    def test_muon_trains_the_matrices_inside_the_layers(self):
        model = make(backbone=tiny(num_hidden_layers=1), train_backbone=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {names[id(parameter)].rpartition("layers.0.")[2] for parameter in layer_matrices(model)}
        parts = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"} | dict.fromkeys(
            ("gate", "up", "down"), "mlp"
        )
        assert found == {f"{part}.{name}_proj.weight" for name, part in parts.items()}

    @pytest.mark.parametrize("factors", [{"write_lr_factor": 10.0}, {"muon_lr_factor": 1.0}])
    def test_rate_factors_with_another_optimizer_are_refused(self, tmp_path, factors):
        model = make(learn_write_lr="scalar")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match=r"another one was passed\. Leave them out"):
            trainer(model, tmp_path, rows(2), optimizers=(optimizer, None), **factors)

    def test_muon_without_trainable_matrices_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="muon_lr_factor needs trainable matrices"):
            trainer(make(), tmp_path, rows(2), muon_lr_factor=1.0).train()


class TestTraining:
    CONFIG = {"train_backbone": True, "learn_write_lr": "scalar"}

    def test_parameter_groups_have_their_own_rates(self, tmp_path):
        run = trainer(
            make(**self.CONFIG), tmp_path, rows(3), max_steps=2, muon_lr_factor=2.0, write_lr_factor=10.0,
            learning_rate=1e-3, lr_scheduler_type="constant",
        )  # fmt: skip
        run.train()
        groups = [(group["lr"], len(group["params"])) for group in run.optimizer.param_groups]
        assert [rate for rate, _ in groups] == pytest.approx([1e-3, 1e-3, 1e-2, 2e-3])
        assert [count for _, count in groups][2:] == [1, 14]
        assert sum(count for _, count in groups) == len(weights(run.model))

    def test_write_lr_factor_scales_how_fast_write_rates_move(self, tmp_path):
        moved = []
        for factor in (1.0, 10.0):
            run = trainer(make(learn_write_lr="scalar"), tmp_path, rows(3), max_steps=1, write_lr_factor=factor)
            run.train()
            moved.append(abs(torch.tensor(logs(run, "write_lr")[0] / 0.3).log().item()))
        assert moved[1] == pytest.approx(10 * moved[0], rel=1e-2)

    def test_training_learns_and_can_be_resumed(self, tmp_path):
        def run(path):
            return trainer(
                make(**self.CONFIG), path, rows(4), max_steps=16, per_device_train_batch_size=4, learning_rate=3e-3,
                muon_lr_factor=1.0, write_lr_factor=5.0, save_strategy="steps", save_steps=8,
            )  # fmt: skip

        whole, resumed = run(tmp_path / "whole"), run(tmp_path / "resumed")
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
        assert logs(whole, "loss")[-1] < 0.7 * logs(whole, "loss")[0]
        assert same(weights(whole.model), weights(resumed.model))

    def test_muon_trains_lora_matrices(self, tmp_path):
        run = trainer(make(lora_config=LORA), tmp_path, rows(3), max_steps=2, muon_lr_factor=1.0)
        run.train()
        assert len(run.optimizer.param_groups[-1]["params"]) == 28


@pytest.mark.parametrize(("optim", "package"), [("adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")])
def test_8_bit_optimizers_need_their_package(tmp_path, optim, package):
    """Without their package the error is Transformers' own."""
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    made = trainer(make(lora_config=LORA), tmp_path, rows(2), optim=optim)
    with pytest.raises(ImportError, match=package):
        made.create_optimizer()
