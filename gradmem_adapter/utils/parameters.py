"""Parameters of adapters and of the backbone, modules with dropout, and wrong tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of all adapters in a model: those of tuner layers, without the layers that they wrap."""
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):  # a mixin, always combined with nn.Module
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
    """The named modules that draw random numbers in training mode."""
    for name, module in model.named_modules():
        fields = ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout")
        shares = [getattr(module, field, None) for field in fields]
        if any(isinstance(share, float) and share > 0 for share in shares):
            yield name, module


@contextmanager
def constant(weights: Iterable[Tensor]) -> Iterator[None]:
    """In the block, trained weights are constants. A compiled layer always computes the gradients of all weights that
    require one, which takes a third of its time if all weights are trained.

    Args:
        weights (`Iterable[Tensor]`): weights that require gradients before and after the block.
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
    """If the block fails, parameters that it froze require gradients again: attaching an adapter freezes all others."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def wrong_names(found: Set[str], needed: Set[str], known: Set[str]) -> list[str]:
    """The problems with the tensors found for a model, one phrase per tensor.

    Args:
        found (`Set[str]`): the names of the tensors.
        needed (`Set[str]`): the names that must exist.
        known (`Set[str]`): the names that may exist.
    """
    missing = [f"{name!r} is missing" for name in sorted(needed - found)]
    return missing + [f"{name!r} is unknown" for name in sorted(found - known)]


def first_of(wrong: Sequence[str], most: int, separator: str = "; ") -> str:
    """The first of several problems, and how many more there are."""
    more = f"; and {len(wrong) - most} more" if len(wrong) > most else ""
    return separator.join(wrong[:most]) + more
