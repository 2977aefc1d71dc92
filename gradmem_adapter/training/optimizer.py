"""Separate learning rates for write learning rates, and Muon for the matrices inside a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradmem_adapter.utils.backbone import layers_of

from .arguments import GradMemTrainingArguments


def with_own_rates(optimizer: Optimizer, model: nn.Module, args: GradMemTrainingArguments) -> Optimizer:
    """The optimizer with separate parameter groups for learned write learning rates and, if requested, the layers'
    matrices (`write_lr_factor`, `muon_lr_factor`)."""
    rates = [p for name, p in model.named_parameters() if "gradmem_log_write_lr" in name and p.requires_grad]
    if rates and args.write_lr_factor != 1:
        _take_out(optimizer, rates)
        group = {"params": rates, "lr": args.write_lr_factor * args.learning_rate, "weight_decay": 0.0}
        optimizer.add_param_group(group)
    if args.muon_lr_factor is None:
        return optimizer
    matrices = layer_matrices(model)
    if not matrices:
        raise ValueError(
            "muon_lr_factor needs trainable matrices inside the backbone's layers, but there are none. Leave it out, "
            "or add a lora_config."
        )
    _take_out(optimizer, matrices)
    rate = args.muon_lr_factor * args.learning_rate
    return WithMuon(optimizer, matrices, lr=rate, weight_decay=args.weight_decay)


def _take_out(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    taken = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices inside the layers of a model: the parameters that Muon is made for (embeddings and heads
    are not)."""
    found = {
        id(parameter): parameter
        for layer in layers_of(model)
        for parameter in layer.parameters()
        if parameter.dim() == 2 and parameter.requires_grad
    }
    return list(found.values())


class WithMuon(Optimizer):
    """An optimizer combined with Muon (Jordan et al., 2024), which trains some matrices.

    Muon's updates are scaled to the size of AdamW's (Moonshot's rule, arXiv 2502.16982), so that both can use one
    learning rate.

    Args:
        other (`Optimizer`): trains its own parameters as before.
        matrices (`Sequence[nn.Parameter]`): the matrices that Muon trains; their groups follow the other's.
        lr, weight_decay (`float`): for Muon.
    """

    def __init__(self, other: Optimizer, matrices: Sequence[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (other, muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts use this optimizer's groups and state, so that schedulers and checkpoints see one optimizer."""
        muon = len(self.parts[1].param_groups)
        self.parts[0].param_groups, self.parts[1].param_groups = self.param_groups[:-muon], self.param_groups[-muon:]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # does not support a closure
        """Take one step of both."""
        if closure is not None:
            raise ValueError(
                "muon_lr_factor does not support an optimizer step with a closure. Call step() without one."
            )
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        super().load_state_dict(state_dict)
        self._share()
