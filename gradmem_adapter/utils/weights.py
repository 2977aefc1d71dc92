"""Reading a model's weights wherever they are: on a device, quantised, in CPU memory or on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


def read_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Everything that a model's modules say they hold, in plain tensors, a module at a time.

    Quantised weights come as the tensors that they are packed into, with their scales. What accelerate has put
    elsewhere is on its device only until the next tensor is asked for.

    Args:
        model (`nn.Module`): the backbone, with adapters or without.

    Yields:
        The name, the tensor, and whether it is an adapter's. The backbone's have the names that they have without one.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    parts = (part for layer in layers for name, part in layer.named_children() if name != "base_layer")
    adapters = {id(module) for part in parts for module in part.modules()}
    for path, module in model.named_modules():
        with align_module_device(module):
            held: dict[str, Tensor] = {}
            module._save_to_state_dict(held, f"{path}." if path else "", keep_vars=True)
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):  # a version number, otherwise
                    for inner, plain in plain_tensors(name.replace(".base_layer.", "."), tensor):
                        yield inner, plain, id(module) in adapters


def keep_gradients(model: PreTrainedModel) -> None:
    """See to it that gradients pass through all layers, which WRITE depends on.

    bitsandbytes is kept from packing 4-bit weights for the instructions of a CPU: it does so in the first pass without
    gradients that a layer sees, and what runs through the layer from then on has no gradient, and no error says so.

    Args:
        model (`PreTrainedModel`): the backbone.

    Raises:
        ValueError: weights are packed already, which bitsandbytes cannot undo without loss, a layer lets no gradient
            through, or the model was made in inference mode.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"This {type(model).__name__} was made inside torch.inference_mode(), whose tensors take no part in "
            "gradients, and WRITE takes gradients of memory. Load the backbone outside, and write and read inside as "
            "you like; load_checkpoint and load_backbone may stand anywhere."
        )
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' own switch
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weights of {name} were packed for this CPU when the backbone ran without gradients, "
                    "and packed weights have none. Load the backbone anew and attach the adapter before its first pass."
                )
        if _is_quantised_linear(module) and not _lets_gradients_through(module, model.dtype):
            raise ValueError(
                f"{name}, a {type(module).__name__} with quantised weights, lets no gradient through to what comes "
                "before it, and WRITE takes gradients of memory. Quantise weights alone and not activations, or by "
                "another library: bitsandbytes, torchao's weight-only types and quanto work."
            )


def _is_quantised_linear(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "in_features", None), int) or isinstance(module, BaseTunerLayer):
        return False
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()


def _lets_gradients_through(module: nn.Module, dtype: torch.dtype) -> bool:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    with torch.inference_mode(False), torch.enable_grad():
        tokens = torch.ones(1, 2, cast(int, module.in_features), dtype=dtype, device=device, requires_grad=True)
        return bool(module(tokens).requires_grad)


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a tensor consists of: itself, or what torchao's and quanto's quantised tensors are packed into.

    Args:
        name (`str`): the tensor's.
        tensor (`Tensor`): any.
    """
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor.detach()
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
