"""Reading a model's weights wherever they are: on a device, quantised, in CPU memory or on disk."""

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
    """Everything in the state dicts of a model's modules, as plain tensors, one module at a time.

    Quantised weights come as their packed tensors and scales. Weights that accelerate has offloaded are on their device
    only until the next tensor is requested.

    Yields:
        The name, the tensor, and whether it belongs to an adapter. Tensors of the backbone have their names without an
        adapter.
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
    """Make sure that gradients pass through all layers, as WRITE needs.

    Stops bitsandbytes from packing 4-bit weights for CPU instructions. It does so in a layer's first pass without
    gradients, and from then on the layer silently passes no gradients.

    Raises:
        ValueError: weights are already packed, which bitsandbytes cannot undo without loss; a layer passes no
            gradients; or the model was created in inference mode.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"This {type(model).__name__} was created inside torch.inference_mode(), whose tensors cannot take part in "
            "autograd, but WRITE needs gradients of the memory. Load the backbone outside of it, or with "
            "load_checkpoint or load_backbone, which work anywhere. Writing and reading inside of it is fine."
        )
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' own flag
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weights of {name} were packed for this CPU when the backbone ran without gradients, "
                    "and packed weights pass no gradients. Load the backbone again and attach the adapter before its "
                    "first pass."
                )
        if _is_quantised_linear(module) and not _lets_gradients_through(module, model.dtype):
            raise ValueError(
                f"{name}, a {type(module).__name__} with quantised weights, passes no gradients to its input, but "
                "WRITE needs gradients of the memory. Quantise only weights and not activations, or use another "
                "library: bitsandbytes, torchao's weight-only types and quanto work."
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
    """The plain tensors in a tensor: itself, or the parts of a quantised tensor of torchao or quanto."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor.detach()
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
