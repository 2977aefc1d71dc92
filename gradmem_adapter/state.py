"""The memory state: the result of WRITE and the input of READ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor

from gradmem_adapter.utils import state_file
from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.files import replacing
from gradmem_adapter.utils.kinds import as_indices, check_kind
from gradmem_adapter.utils.state_file import TENSORS, MemoryStateError
from gradmem_adapter.utils.wording import counted

_PATH = str | os.PathLike


@dataclass(frozen=True, eq=False, repr=False)
class MemoryState:
    """A batch of written contexts: what WRITE makes and READ takes.

    Args:
        vectors (`Tensor`): `[B, m, d]`, the memory itself, before projection and control vectors, so that WRITE can
            continue from it.
        context_tokens (`Tensor`): `[B]` integers, the number of tokens in each context.
        write_losses (`Tensor`): `[B, steps + 1]`, the write loss in nats per token before each step and after the last;
            a sample that stopped early repeats its last loss.
        fingerprint (`str`): the identity of the backbone and adapter that wrote it.

    Raises:
        TypeError, ValueError: a tensor has the wrong kind or shape.
    """

    vectors: Tensor
    context_tokens: Tensor
    write_losses: Tensor
    fingerprint: str

    def __post_init__(self) -> None:
        for name in TENSORS:
            check_kind(name, getattr(self, name), Tensor, "a tensor")
        if not self.vectors.is_floating_point():
            raise TypeError(f"vectors must be floating point, got {self.vectors.dtype}.")
        if self.vectors.dim() != 3 or 0 in self.vectors.shape:
            raise ValueError(
                "vectors must have shape [batch, memory tokens, width], none of them 0, got "
                f"{tuple(self.vectors.shape)}."
            )
        if self.context_tokens.is_floating_point() or self.context_tokens.shape != self.vectors.shape[:1]:
            raise ValueError(
                f"context_tokens must hold {counted(len(self.vectors), 'integer')}, one per state, got shape "
                f"{tuple(self.context_tokens.shape)} of {self.context_tokens.dtype}."
            )
        losses = self.write_losses
        if losses.dim() != 2 or len(losses) != len(self.vectors) or losses.shape[1] == 0:
            raise ValueError(
                f"write_losses must have shape [{len(self.vectors)}, steps + 1], got {tuple(losses.shape)}."
            )
        check_kind("fingerprint", self.fingerprint, str, "a string")

    # ---------------------------------------------------------------- shape

    @property
    def num_memory_tokens(self) -> int:
        """m, the number of vectors per state."""
        return self.vectors.shape[1]

    @property
    def width(self) -> int:
        """d, the size of a vector."""
        return self.vectors.shape[2]

    @property
    def nbytes(self) -> int:
        """Size in bytes of the vectors of all states together."""
        return self.vectors.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    def __len__(self) -> int:
        """B, the number of states."""
        return len(self.vectors)

    def __iter__(self) -> Iterator[MemoryState]:
        """The states one by one, each a batch of one."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> MemoryState:
        """Select states.

        Args:
            index (`int`, `slice`, `Sequence[int]` or `Tensor`): an integer gives a batch of one; a tensor holds
                integers or booleans.

        Raises:
            IndexError: there is no such state, or none is selected.
        """
        if isinstance(index, SupportsIndex) and not getattr(index, "ndim", 0):
            number = index.__index__()
            if not -len(self) <= number < len(self):
                raise IndexError(f"Index {number} is out of range for {counted(len(self), 'memory state')}.")
            index = [number]
        if isinstance(index, slice):  # as a list, because tensors do not support negative steps
            index = list(range(len(self)))[index]
        rows = as_indices("The index of a MemoryState", index, "an integer, a slice or a list of integers", self.device)
        if rows.dim() != 1:
            raise IndexError(
                f"The index of a MemoryState must be an integer or a list of integers, got shape {tuple(rows.shape)}."
            )
        if not (rows.any() if rows.dtype == torch.bool else rows.numel()):
            raise IndexError("The selection is empty; a MemoryState holds at least one state.")
        return self._map(lambda tensor: tensor[rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        vectors, context_tokens, write_losses = (function(getattr(self, name)) for name in TENSORS)
        return MemoryState(vectors, context_tokens, write_losses, self.fingerprint)

    @staticmethod
    def stack(states: Sequence[MemoryState]) -> MemoryState:
        """Stack states into one batch, in order.

        Args:
            states (`Sequence[MemoryState]`): states of the same model and shape.

        Raises:
            ValueError: no states, or states of different models, shapes or dtypes.
        """
        states = _compatible(states, "stack", ("num_memory_tokens", "width", "dtype", "device", "fingerprint"))
        if len(states) == 1:
            return states[0]  # the same object, because READ caches by object
        return MemoryState(
            vectors=torch.cat([state.vectors for state in states]),
            context_tokens=torch.cat([state.context_tokens for state in states]),
            write_losses=torch.cat(_same_steps(states)),
            fingerprint=states[0].fingerprint,
        )

    @staticmethod
    def concat(states: Sequence[MemoryState]) -> MemoryState:
        """Put states side by side, to be read as one longer prefix: state i of the result is made of state i of each.

        `context_tokens` add up; `write_losses` are averaged over all tokens.

        Args:
            states (`Sequence[MemoryState]`): states of the same model, with the same number of states each.

        Raises:
            ValueError: no states, or states of different models, widths, dtypes or batch sizes.
        """
        states = _compatible(states, "concat", ("batch size", "width", "dtype", "device", "fingerprint"))
        if len(states) == 1:
            return states[0]
        tokens = torch.stack([state.context_tokens for state in states])
        losses = torch.stack(_same_steps(states))
        return MemoryState(
            vectors=torch.cat([state.vectors for state in states], dim=1),
            context_tokens=tokens.sum(0),
            write_losses=(losses * tokens[..., None]).sum(0) / tokens.sum(0)[:, None],
            fingerprint=states[0].fingerprint,
        )

    # ---------------------------------------------------------------- place

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Move the states to a device, or convert their vectors to a dtype.

        Args:
            device (`torch.device` or `str`, *optional*): the target device. `None`: unchanged.
            dtype (`torch.dtype`, *optional*): a floating-point dtype for the vectors; bfloat16 halves their size.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        check_kind("dtype", dtype, torch.dtype | None, "a dtype such as torch.bfloat16")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"vectors must be floating point, got {dtype}.")
        moved = self._map(lambda tensor: tensor.to(device))
        return MemoryState(moved.vectors.to(dtype), moved.context_tokens, moved.write_losses, self.fingerprint)

    def cpu(self) -> MemoryState:
        return self.to("cpu")

    def detach(self) -> MemoryState:
        return self._map(Tensor.detach)

    def equal(self, other: MemoryState) -> bool:
        """Whether values (bit for bit), dtypes and fingerprint are equal, whatever the device."""
        check_state("other", other)
        return self._encoded() == other._encoded()

    def __eq__(self, other: object) -> bool:
        return self.equal(other) if isinstance(other, MemoryState) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._encoded())

    def __repr__(self) -> str:
        batch, m, d = self.vectors.shape
        return (
            f"MemoryState({batch} x {m} vectors of {d} {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{self.context_tokens.tolist() if batch <= 8 else int(self.context_tokens.sum())} context tokens, "
            f"model {self.fingerprint[:8]})"
        )

    # ---------------------------------------------------------------- files

    def to_bytes(self) -> bytes:
        """One safetensors file with a digest of its contents; equal states give equal bytes.

        Raises:
            ValueError: vectors are not finite, or numbers of tokens are impossible; `from_bytes` would refuse them.
        """
        check_finite(self)
        return self._encoded()

    def _encoded(self) -> bytes:
        return state_file.encode({name: getattr(self, name) for name in TENSORS}, self.fingerprint)

    @classmethod
    def from_bytes(cls, data: bytes, device: torch.device | str = "cpu") -> MemoryState:
        """Read the output of `to_bytes`. Never unpickles.

        Args:
            data (`bytes`): one safetensors file.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where to put the tensors.

        Raises:
            MemoryStateError: the data is truncated, foreign, damaged or of a newer version.
        """
        tensors, fingerprint, _ = state_file.decode(data)
        try:
            state = cls(**state_file.widened(tensors), fingerprint=fingerprint)
        except (TypeError, ValueError) as error:
            raise MemoryStateError(f"The memory state has the wrong tensors: {error}") from error
        return state.to(device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, whole or not at all: an existing file stays until the new one is complete.

        Args:
            path (`str` or `PathLike`): the file to write.

        Raises:
            FileNotFoundError: the directory does not exist.
            OSError: the file cannot be written, or `path` exists and is not a file.
            ValueError: as for `to_bytes`.
        """
        check_kind("path", path, _PATH, "a path")
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MemoryState:
        """Read a file written by `save`. Never unpickles.

        Args:
            path (`str` or `PathLike`): the file.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where to put the tensors.

        Raises:
            MemoryStateError: the file is truncated, foreign, damaged or of a newer version.
            FileNotFoundError: there is no such file.
            OSError: it cannot be opened, or is a device or a pipe.
        """
        check_kind("path", path, _PATH, "a path")
        try:
            return cls.from_bytes(state_file.read(Path(path)), device)
        except MemoryStateError as error:
            raise MemoryStateError(f"{os.fspath(path)}: {error}") from error.__cause__


def check_state(name: str, memory: object) -> None:
    """Raise `TypeError` for anything but a memory state."""
    wanted = (
        "a MemoryState, as write(), MemoryState.load(), a store's get(keys) and the .states of a DocumentMemory return"
    )
    if isinstance(memory, list | tuple):
        wanted += (
            " (use MemoryState.stack(states) for a list of states, and store.get([choice.entry.key for choice in "
            "choices]) for the result of a store's choose)"
        )
    check_kind(name, memory, MemoryState, wanted)


def check_finite(memory: MemoryState) -> None:
    """Raise `ValueError` unless the vectors of all states are finite. Not checked during CUDA graph capture."""
    if not capturing() and not memory.vectors.isfinite().all():
        raise ValueError(
            "The memory state has vectors that are not finite, because WRITE diverged or a narrower dtype overflowed. "
            "Write the context again, with a smaller write learning rate if WRITE diverged."
        )


def check_readable(memory: MemoryState, width: int, fingerprint: str | None) -> None:
    """Raise unless a model can read states. In training, a model reads its own states, which are not checked here.

    Args:
        memory (`MemoryState`): the states.
        width (`int`): d, the size of the model's memory vectors.
        fingerprint (`str`, *optional*): the model's. `None`: also allow states of another model.

    Raises:
        TypeError: `memory` is not a state.
        ValueError: another model wrote it, or it has vectors that are not finite.
    """
    check_state("memory", memory)
    if memory.width != width:
        raise ValueError(
            f"The memory state has vectors of width {memory.width}, but the model's have width {width}: another model "
            "wrote it. Write the context again with this model."
        )
    if fingerprint is not None and memory.fingerprint != fingerprint:
        raise ValueError(
            f"The memory state was written by model {memory.fingerprint}, but this is model {fingerprint} (backbone "
            "and adapter), which would read it as noise. Write the context again with this model. In Python, "
            "strict=False reads it anyway, at your own risk."
        )
    check_finite(memory)


def _compatible(states: Sequence[MemoryState], what: str, names: Sequence[str]) -> list[MemoryState]:
    """The states as a list, if they agree in the named properties."""
    check_kind(f"The argument of {what}", states, Iterable, "a list of memory states")
    states = list(states)
    if not states:
        raise ValueError(f"There are no memory states to {what}.")
    if wrong := [type(state).__name__ for state in states if not isinstance(state, MemoryState)]:
        raise TypeError(f"Expected memory states to {what}, got {', '.join(wrong)}.")
    for name in names:
        values = [len(state) if name == "batch size" else getattr(state, name) for state in states]
        if len(set(values)) > 1:
            raise ValueError(f"Memory states to {what} must have the same {name}, got {values}.")
    return states


def _same_steps(states: Sequence[MemoryState]) -> list[Tensor]:
    """The write losses of each state, with the last loss repeated for states with fewer steps."""
    steps = max(state.write_losses.shape[1] for state in states)
    return [
        torch.cat([losses := state.write_losses, losses[:, -1:].expand(-1, steps - losses.shape[1])], dim=1)
        for state in states
    ]
