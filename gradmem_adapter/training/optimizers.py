"""AdamW, and Muon for the matrices inside a model's layers, with a learning rate that a CUDA graph reads anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices inside the layers of a model: what Muon is made for (embeddings and heads are not)."""
    found = {
        id(parameter): parameter
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for parameter in layer.parameters()
        if parameter.dim() == 2 and parameter.requires_grad
    }
    return list(found.values())


class Optimizers:
    """AdamW, for `matrices` Muon (Jordan et al., 2024), whose updates have the size that AdamW's would have (Moonshot's
    rule, arXiv 2502.16982).

    Args:
        parameters: all that is trained.
        factors: how many times the learning rate some of them are trained at.
        matrices: those that Muon trains, at `muon_rate` times the learning rate.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter] = (),
        *,
        factors: Mapping[nn.Parameter, float] | None = None,
        muon_rate: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.matrices, self.muon_rate = list(matrices), muon_rate
        device = parameters[0].device
        self.lr = torch.zeros((), device=device)
        groups: dict[float, list[nn.Parameter]] = {}
        others = {id(parameter) for parameter in matrices}
        for parameter in parameters:
            if id(parameter) not in others:
                groups.setdefault((factors or {}).get(parameter, 1.0), []).append(parameter)
        # Tensors, which a CUDA graph reads anew; those of the groups follow `lr` in `step`.
        self.rates = [(factor, torch.zeros((), device=device)) for factor in groups]
        self.all: list[torch.optim.Optimizer] = []
        if groups:
            named = [
                {"params": group, "lr": rate} for group, (_, rate) in zip(groups.values(), self.rates, strict=True)
            ]
            capturable = device.type == "cuda"
            self.all.append(
                torch.optim.AdamW(named, betas=betas, weight_decay=weight_decay, fused=True, capturable=capturable)
            )
        if self.matrices:
            self.all.append(
                torch.optim.Muon(self.matrices, lr=1.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    @torch.no_grad()
    def step(self) -> None:
        """One step at the rate that `lr` holds."""
        for factor, rate in self.rates:
            rate.copy_(factor * self.lr)
        before = [matrix.clone() for matrix in self.matrices]
        for optimizer in self.all:
            optimizer.step()
        # torch's Muon takes its rate as a Python number, which a graph would repeat: it steps at 1, and this is undone.
        for matrix, start in zip(self.matrices, before, strict=True):
            matrix.copy_(torch.lerp(start, matrix, self.muon_rate * self.lr))

    def state_dict(self) -> list[dict[str, Any]]:
        """What the optimizers carry."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up the optimizers' states."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
            if isinstance(optimizer, torch.optim.AdamW):
                for group, (_, rate) in zip(optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate
