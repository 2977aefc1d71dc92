"""What tables of time and memory share: the hardware, the shapes of models and batches, bytes and times."""

from __future__ import annotations

import math
from typing import Any

from .cells import Frame

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
SHAPES = {"qwen2.5-0.5b": "Qwen2.5-0.5B", "smollm2-1.7b": "SmolLM2-1.7B", "llama-3.1-8b": "Llama-3.1-8B"}


def shape_title(row: Any) -> str:
    """The name of a record's model shape in tables."""
    return SHAPES.get(row.get("shape"), "SmolLM2-135M")


def shape(row: Any) -> str:
    """A batch's shape, such as "8 x 1,024 tokens, K=5"."""
    return f"{row['batch']} x {row['length']:,} tokens, K={row['write_steps']:.0f}"


def shapes(table: Frame) -> list[str]:
    """The shape of each row."""
    return [shape(row) for _, row in table.iterrows()]


def megabytes(value: float) -> str:
    """Bytes, such as "11.8 MB" or "37 kB"."""
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def spans(milliseconds: float) -> str:
    """A time, such as "63 ms", "2.39 s" or "50.2 s"."""
    if milliseconds < 1000:
        return f"{math.floor(milliseconds + 0.5)} ms"
    return f"{milliseconds / 1000:,.{1 if milliseconds >= 10_000 else 2}f} s"
