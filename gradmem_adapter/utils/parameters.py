"""Which parameters are an adapter's and which the backbone's, which parts draw dropout, which tensors are amiss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of all adapters in a model: those of tuner layers, without what these wrap."""
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):  # a mixin of modules
            for name, child in cast(nn.Module, layer).named_children():
                if name != "base_layer":
                    yield from child.named_parameters(prefix=f"{layer_name}.{name}")


def backbone_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of the backbone itself, under the names they have without an adapter."""
    adapters = {id(parameter) for _, parameter in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            yield name.replace(".base_layer.", "."), parameter


def parts_with_dropout(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules that draw random numbers in training mode.

    Args:
        model (`nn.Module`): in any mode.
    """
    for name, module in model.named_modules():
        fields = ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout")
        shares = [getattr(module, field, None) for field in fields]
        if any(isinstance(share, float) and share > 0 for share in shares):
            yield name, module


@contextmanager
def constant(weights: Iterable[Tensor]) -> Iterator[None]:
    """Trained weights are constants inside. A compiled layer computes the gradients of all that require one, whether
    they are asked for or not: a third of its time where all weights are trained.

    Args:
        weights (`Iterable[Tensor]`): they require gradients before and afterwards.
    """
    trained = [weight for weight in weights if weight.requires_grad and weight.is_leaf]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextmanager
def trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Parameters that are frozen inside require gradients again where the block fails: attaching an adapter freezes
    all others.

    Args:
        model (`nn.Module`): whose they are.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def wrong_names(found: Set[str], needed: Set[str], known: Set[str]) -> list[str]:
    """What is wrong with the tensors that were found for a model, one by one, in words.

    Args:
        found (`Set[str]`): their names.
        needed (`Set[str]`): those that must be there.
        known (`Set[str]`): those that may be there.
    """
    missing = [f"{name!r} is missing" for name in sorted(needed - found)]
    return missing + [f"{name!r} is unknown" for name in sorted(found - known)]


def first_of(wrong: Sequence[str], most: int, separator: str = "; ") -> str:
    """The first of several faults, and how many more there are.

    Args:
        wrong (`Sequence[str]`): in words.
        most (`int`): that are named.
        separator (`str`, *optional*, defaults to `"; "`): between them.
    """
    more = f"; and {len(wrong) - most} more" if len(wrong) > most else ""
    return separator.join(wrong[:most]) + more
