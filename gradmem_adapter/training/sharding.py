"""FSDP2: trained weights, their gradients and the optimizer's state, sharded over processes.

FSDP2 gathers a sharded module's weights before its forward pass and frees them after it. WRITE runs the backbone's
layers inside the forward and inside the backward pass of the whole model, so parts that are sharded separately would be
freed while they are in use. Here, the whole model is one unit: its weights are gathered for a step, and its gradients
are sharded after the step's backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import GradMemTrainingArguments


def shard_as_one(accelerator: Accelerator) -> None:
    """Let `accelerator.prepare` shard a model as one unit, with its weights in their own dtype.

    Mixed precision is left to autocast, as with one process.

    Args:
        accelerator (`Accelerator`): an accelerator with FSDP2. Its checkpoints become full, not sharded.
    """
    plugin, prepare = accelerator.state.fsdp_plugin, accelerator.prepare
    plugin.auto_wrap_policy = plugin.mixed_precision_policy = None
    plugin.set_state_dict_type("FULL_STATE_DICT")

    def prepare_whole(model: Any, *others: Any) -> Any:
        if not isinstance(model, nn.Module):
            return prepare(model, *others)
        if not others:  # only evaluation: nothing to shard
            return model.to(accelerator.device)
        parts = ("get_input_embeddings", "get_output_embeddings")  # accelerate would shard these separately
        model.__dict__.update(dict.fromkeys(parts, lambda: None))
        try:
            prepared = prepare(model, *others)
        finally:
            for part in parts:
                del model.__dict__[part]
        if sum(isinstance(module, FSDPModule) for module in model.modules()) != 1:
            raise NotImplementedError(
                "GradMemTrainer shards a model as one unit, but parts of this model are sharded separately. Pass a "
                "model that is not sharded."
            )
        return prepared

    accelerator.prepare = prepare_whole


def check_sharding(accelerator: Accelerator, args: GradMemTrainingArguments) -> None:
    """Raise `NotImplementedError` for a kind of sharding that WRITE does not work with."""
    state = accelerator.state
    if state.deepspeed_plugin is not None:
        raise NotImplementedError(
            "GradMemTrainer does not work with DeepSpeed, which does not gather the weights that WRITE needs inside "
            "the backward pass. Use FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`) or DDP."
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    refused = {
        "version 1": plugin.fsdp_version != 2,
        "activation_checkpointing": plugin.activation_checkpointing,
        "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "muon_lr_factor": args.muon_lr_factor is not None,
        "cuda_graphs": args.cuda_graphs,
    }
    for name in (name for name, there in refused.items() if there):
        instead = {"version 1": "version 2", "activation_checkpointing": "gradient_checkpointing=True"}.get(name)
        raise NotImplementedError(
            f"GradMemTrainer does not work with FSDP and {name}. "
            + (f"Use {instead} instead." if instead else "Leave one of the two out.")
        )


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a possibly sharded one. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_weights(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """In the block, the model's parameters are plain tensors in all processes. All processes must enter it.

    Args:
        model (`nn.Module`): sharded or not.
        keep (`bool`, *optional*, defaults to `False`): keep what process 0 writes to the parameters.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
    shared: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    gathered = {part: nn.Parameter(whole(part.detach()), part.requires_grad) for _, _, part in shared}
    for module, name, part in shared:
        module._parameters[name] = gathered[part]
    try:
        yield
        for part, full in gathered.items() if keep else ():
            part.detach().copy_(distribute_tensor(full.detach(), part.device_mesh, part.placements))
    finally:
        for module, name, part in shared:
            module._parameters[name] = part
