"""Helpers that tests of the meta-gradient share."""

import torch
from tiny import tokens
from torch.nn import functional as F


def relative(actual, expected):
    """A clamped relative error: even in float64, Transformers computes normalisation and losses in float32."""
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-2)).item()


def loss64(model, seed=None, **kwargs):
    """The outer loss without the float32 of Transformers' own loss, on a model that is float64 throughout (GPT-2)."""
    if seed is not None:
        torch.manual_seed(seed)
    query = tokens(2, 5, seed=1)
    output = model(input_ids=query, context_input_ids=tokens(2, 9, seed=2), **kwargs)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), query[:, 1:].flatten())
    return loss + model.active_peft_config.reconstruction_weight * output.write_losses[:, -1].mean()


def difference_along_gradient(model, parameter, seed=None, e=1e-5, **kwargs):
    direction = parameter.grad / parameter.grad.norm().clamp(min=1e-30)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * e * direction)
        values.append(loss64(model, seed, **kwargs).item())
        with torch.no_grad():
            parameter.sub_(sign * e * direction)
    return (values[0] - values[1]) / (2 * e)


def train_step(model, **kwargs):
    model.zero_grad()
    inputs = {
        "input_ids": tokens(2, 5, seed=1),
        "labels": tokens(2, 5, seed=1),
        "context_input_ids": tokens(2, 9, seed=2),
    } | kwargs
    output = model(**inputs)
    output.loss.backward()
    return output


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
