"""Repeating a computation under the conditions of its first run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class Replay:
    """Repeats a computation under the autocast and random state of its first run (dropout draws the same mask).

    Create it before the first run, call `end` after that run, and repeat the computation inside `with replay():`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        # The random state cannot be read while a CUDA graph is captured.
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.state = None if captured else self._random_state()
        self.drew = False
        """Whether the first run drew random numbers."""

    def _random_state(self) -> tuple[Tensor, list[int], list[Tensor]]:
        return torch.get_rng_state(), *get_device_states(torch.empty(0, device=self.device))

    def end(self) -> None:
        """Mark the end of the first run."""
        if self.state is not None:
            now = self._random_state()
            pairs = [(self.state[0], now[0]), *zip(self.state[2], now[2], strict=True)]
            self.drew = not all(torch.equal(before, after) for before, after in pairs)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            if self.state is None:
                yield
                return
            cpu, devices, states = self.state
            with torch.random.fork_rng(devices, device_type=self.device.type) if devices else torch.random.fork_rng([]):
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self.device.type)
                yield
