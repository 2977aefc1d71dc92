"""Properties of the device: free memory, and how much work fits into it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from gradmem_adapter.utils import graphs

SATURATED = {"cuda": 16_384, "cpu": 512}
"""Tokens per batch, including padding, beyond which a device gets no faster and only uses more memory, and an
interruption loses more work."""

SHARE_OF_FREE_MEMORY = {"cuda": 0.3, "cpu": 0.6}
"""The share of free memory that the tensors of a batch of contexts may take."""

OVERHEAD = {"cpu": 2.0}
"""How much more memory a process takes than its tensors: on a CPU, freed blocks are not returned at once."""

MARGIN = 0.9
"""The usable share of a GPU's free memory, which is fragmented."""

UNCHECKED = 2**28
"""A WRITE that needs less than 256 MiB starts without checking free memory."""


def device_here(name: str | torch.device) -> torch.device:
    """The device with a name.

    Raises:
        ValueError: this machine does not have the device.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about deprecated device types
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # the only reliable check
    except (RuntimeError, AssertionError, ImportError) as error:
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"There is no device {str(name)!r} on this machine; use {there}.") from error
    return device


def free_memory(device: torch.device) -> int:
    """Free bytes on a device that the process may use.

    Args:
        device (`torch.device`): a GPU; anything else counts as the CPU.
    """
    if device.type == "cuda":
        return int(MARGIN * graphs.free_on_gpu(device))
    return max(0, min([psutil.virtual_memory().available, *_left_by_control_groups()]))


_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of Linux's control groups, version 2 and 1."""


def _left_by_control_groups() -> Iterator[int]:
    """The bytes left within the limit of each control group (container, service) of the process. psutil ignores these
    limits, but the system kills a process that exceeds one."""
    groups = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    for _, kind, name in (line.split(":", 2) for line in groups):
        root = _GROUPS / kind
        own = root / name.lstrip("/")
        for folder in (own, *own.parents) if kind in ("", "memory") else ():
            for limit, usage in _LIMITS:
                try:
                    left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                    kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # no such group here, or no limit
                    continue
                yield left + int(kept.get("total_inactive_file") or kept.get("inactive_file") or 0)  # file cache
