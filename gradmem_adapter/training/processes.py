"""Several processes that train one model, each on a device of its own; of a process alone, nothing here costs anything.

What is about time or about what a user wants is decided by process 0 and told to the others: clocks differ, and
processes that do not end at the same step wait for each other for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 is the one that saves and prints."""
    return distributed.get_rank() if world_size() > 1 else 0


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """This process as one of those that torchrun or accelerate launch started; all leave the `with` together.

    A process group that is there already is used as it is.

    Args:
        device: "cpu", or "cuda" without a number.

    Yields:
        The device of this process.

    Raises:
        ValueError: the environment is incomplete, or a process has no GPU of its own.
    """
    started = world_size() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if started:
        device = _own(device)
        # Gradients go over NCCL, what processes agree on over gloo: numbers on the CPU, which no GPU is waited for.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    yield device
    barrier()  # Not after an error, which the others may not have: the launcher ends them, and the group with them.
    if started:
        distributed.destroy_process_group()


def _own(device: torch.device) -> torch.device:
    """The device of this process among those of its machine."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"Each process takes a GPU of its own, so all cannot run on {device}: say cuda, or nothing.")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("WORLD_SIZE is set and LOCAL_RANK is not: start the processes by torchrun, or unset both.")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise ValueError(
            f"Process {number} of this machine has no GPU: there are {there}. Start as many processes as GPUs "
            "(--nproc_per_node), or use --device cpu."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        distributed.all_reduce(torch.zeros(()))


@contextmanager
def one_after_another() -> Iterator[None]:
    """The `with` runs in process 0 first, and in the others when that is done, or has failed."""
    if rank() > 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def agree(*values: float) -> tuple[float, ...]:
    """The numbers that process 0 has, in all processes."""
    if world_size() == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.float64)
    distributed.broadcast(numbers, 0)
    return tuple(numbers.tolist())


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes, on the CPU where there are several."""
    if world_size() == 1:
        return values
    total = values.to("cpu", copy=True)
    distributed.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def share_weights(model: nn.Module) -> None:
    """Give all processes the weights of process 0."""
    if world_size() > 1:
        for parameter in model.parameters():
            distributed.broadcast(parameter, 0)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give all processes the mean of their gradients, in one message, which a CUDA graph can capture.

    Args:
        parameters: those without a gradient must be the same in all processes.
    """
    if world_size() == 1:
        return
    having = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for _, gradient in having])
    distributed.all_reduce(flat)
    flat /= world_size()
    pieces = flat.split([gradient.numel() for _, gradient in having])
    for (parameter, gradient), piece in zip(having, pieces, strict=True):
        parameter.grad = piece.view_as(gradient).to(gradient.dtype)  # a view, unless gradients have several types
