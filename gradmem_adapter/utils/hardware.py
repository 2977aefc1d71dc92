"""What the device has: free memory, and how much work fits into it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from gradmem_adapter.utils import graphs

SATURATED = {"cuda": 16_384, "cpu": 512}
"""Padded tokens a batch beyond which a device gets no faster, only fuller, and what is interrupted loses more."""

SHARE_OF_FREE_MEMORY = {"cuda": 0.3, "cpu": 0.6}
"""What the tensors of a batch of many contexts may fill of it."""

OVERHEAD = {"cpu": 2.0}
"""How much more memory a process takes than its tensors have: on a CPU freed blocks are not given back at once."""

MARGIN = 0.9
"""What can be had of a GPU's free memory: it is in pieces."""

UNCHECKED = 2**28
"""A write that needs less than 256 MiB begins without a look at what is free."""


def device_here(name: str | torch.device) -> torch.device:
    """The device of a name.

    Args:
        name (`str` or `torch.device`): such as `"cuda"` or `"cuda:1"`.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of kinds that there once were
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # which is how one finds out
    except (RuntimeError, AssertionError, ImportError) as error:
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"There is no device {str(name)!r} here; take {there}.") from error
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as far as the process may have them.

    Args:
        device (`torch.device`): a GPU, or anything else, which counts as the CPU.
    """
    if device.type == "cuda":
        return int(MARGIN * graphs.free_on_gpu(device))
    return max(0, min([psutil.virtual_memory().available, *_left_by_control_groups()]))


_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of Linux's control groups, version 2 and 1."""


def _left_by_control_groups() -> Iterator[int]:
    """What each control group (container, service) that the process is in leaves of its limit. psutil knows nothing of
    them, and the system ends who goes beyond."""
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
                yield left + int(kept.get("total_inactive_file") or kept.get("inactive_file") or 0)  # pages of files
