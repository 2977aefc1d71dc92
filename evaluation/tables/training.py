"""Tables of what training costs, and of how exact meta-gradients are."""

from __future__ import annotations

import pandas as pd

from .cells import Frame, grid, in_order, read, time_and_memory
from .hardware import H100, H200, shapes

STEPS = {"graph": "compiled, one CUDA graph", "compiled": "layers compiled", "eager": ""}


def _strategy(method: str) -> str:
    name, _, how = method.partition(", ")
    return "textbook" if name == "textbook" else f"`{name}`" + (f", {STEPS[how]}" if STEPS[how] else "")


def _costs(table: Frame) -> Frame:
    names = ["textbook", *(f"{s}, {h}" for s in ("exact", "finite_difference", "first_order") for h in reversed(STEPS))]
    table = in_order(table.sort_values(["batch", "write_steps"], kind="stable"), names)
    table = table.assign(head=shapes(table))
    heads = table.sort_values(["batch", "write_steps"])["head"].drop_duplicates()
    found = grid(table, [_strategy(name) for name in table["method"]], table["head"].tolist(), time_and_memory)
    return found[["", *heads]]


def train_step() -> Frame:
    """The cost of a training step at a batch size that uses a GPU well."""
    return _costs(read("train_step", batch=8))


def train_step_lora() -> Frame:
    """The cost of a training step of a LoRA at the size of Llama-3.1-8B, on one H200."""
    table = read("train_step_lora", hardware=H200, shape="llama-3.1-8b")
    again = {n: f"gradient checkpointing of {n} of 32 layers" for n in range(1, 32)}
    again |= {0: "all activations kept", 32: "gradient checkpointing"}
    table = table.reindex(columns=list(dict.fromkeys((*table, "micro_batch")))).fillna({"checkpointing": 0})
    ways = table["method"].str.partition(", ")[2].map({"eager": "launched kernel by kernel", "compiled": "compiled"})
    parts = table["micro_batch"].map({1: ", one context at a time"}).fillna("")
    return grid(
        table, ways + ", " + table["checkpointing"].astype(int).map(again) + parts, shapes(table), time_and_memory
    )


def meta_gradient_cost() -> Frame:
    """The cost of a training step for every strategy, compared with a textbook implementation."""
    return _costs(read("train_step", batch=4))


def meta_gradient_accuracy() -> Frame:
    """Cosine with the exact gradient in float32, with the current rule for the finite difference's step."""
    names = ["first order float32", "double backward bf16 by the textbook", "exact bf16", "finite difference bf16",
             "finite difference TF32", "finite difference float32"]  # fmt: skip
    table = in_order(read("meta_gradient_accuracy", hardware=H100).sort_values("relative_step", kind="stable"), names)
    table = table[~table["method"].isin(names[4:]) | (table["relative_step"] == 0.005)]
    table = table.sort_values("write_lr", kind="stable")
    heads = table["method"].str.replace(r" (float32|bf16|TF32)", r", \1", regex=True)
    heads += table["relative_step"].map(lambda step: "" if pd.isna(step) else f", step {step:g}")
    rows = table["write_lr"].map("{:g}".format)
    return grid(table, rows, heads, "{cosine:.5f}", "write lr")


def meta_gradient_kinks() -> Frame:
    """Cosine with the exact gradient if the loss has kinks."""
    table = read("meta_gradient_kinks")
    rows = [f"`{row['backbone']}`, weights x {row['weight_scale']:g}" for _, row in table.iterrows()]
    return grid(table, rows, table["method"], "{cosine_median:.2f} ({cosine_lowest:.2f})", "median (lowest) of 8 seeds")


def kv_step() -> Frame:
    """Training steps per second on key-value retrieval."""
    table = read("kv_step")
    rows = [f"{row['pairs']} pairs, K={row['write_steps']:.0f}: `{row['method']}`, {'bf16' if row['bf16'] else 'TF32'}"
            for _, row in table.iterrows()]  # fmt: skip
    names = {(False, False): "eager", (False, True): "CUDA graph", (True, False): "layers compiled",
             (True, True): "compiled, CUDA graph"}  # fmt: skip
    heads = [names[way] for way in zip(table["compiled"], table["graph"], strict=True)]
    found = grid(table, rows, heads, "{steps_per_second:.1f}", "steps a second")
    return found[["steps a second", *names.values()]]


def training_speed() -> Frame:
    """Steps per second of the Trainer on one H200. The records also have those of an earlier loop (see the lab log)."""
    table = in_order(read("training_speed"), ["Trainer, compiled, CUDA graphs", "Trainer as it is"])
    cell = "{steps_per_second:.1f}, {peak_gib:.1f} GiB"
    return grid(table, table["what"], table["method"], cell, "steps a second, peak memory")


TABLES = (
    kv_step,
    meta_gradient_accuracy,
    meta_gradient_cost,
    meta_gradient_kinks,
    train_step,
    train_step_lora,
    training_speed,
)
