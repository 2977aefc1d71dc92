"""Tables of time and memory."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from .cells import Frame, grid, in_order, percent, read, time_and_memory

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
SHAPES = {"qwen2.5-0.5b": "Qwen2.5-0.5B", "smollm2-1.7b": "SmolLM2-1.7B", "llama-3.1-8b": "Llama-3.1-8B"}
PROMPTING = {
    "8b": {"shape": "llama-3.1-8b", "hardware": H200},
    "1.7b": {"shape": "smollm2-1.7b", "hardware": H200},
    "0.5b": {"shape": "qwen2.5-0.5b", "hardware": H200},
    "gpu": {"hardware": H100, "date": "2026-11-25"},  # when it ran nothing else
    "cpu": {"hardware": "Intel(R) Xeon(R) Processor, 2 threads"},
}
"""Where memory is compared with the whole context before the question, for tables and plots."""
HOW = {
    "textbook": "textbook (its graph kept)", "textbook, no graph": "textbook, no graph kept",
    "plain": "plain (launched kernel by kernel)", "compiled": "compiled, one CUDA graph per pass",
    "compiled, no last loss": "the same with `last_loss=False`",
}  # fmt: skip
"""Labels of the ways to WRITE."""
STEPS = {"graph": "compiled, one CUDA graph", "compiled": "layers compiled", "eager": ""}


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


def choice() -> Frame:
    """How often the state that a question needs is chosen, and how long choosing takes."""
    rows = []
    for _, row in read("choose").iterrows():
        where = {"by": row["method"], "states": f"{row['states']:,}", "questions": f"{row['questions']:,}"}
        shares = {"the right one first %": percent(row["right_of_1"]), "among 4 %": percent(row["right_of_4"])}
        rows.append(where | shares | {"processor time": f"{row['processor_milliseconds']:.0f} ms"})
    return Frame(rows)


def service() -> Frame:
    """LangChain's chat model under concurrent requests, with and without batches."""
    rows = [
        {
            "answered together": row["max_batch"],
            "requests a second": f"{row['requests_per_second']:.2f}",
            "in the first round": f"{row['cold_requests_per_second']:.2f}",
            "writes": f"{row['writes']:.0f}",
            "errors": f"{row['errors']:.0f}",
            "right %": percent(row["right"]),
            "growth": f"{row['growth_mib']:.0f} MiB",
            "one request": spans(row["alone_ms"]),
            "one after cancelled ones": spans(row["after_cancelled_ms"]),
        }
        for _, row in read("service").iterrows()
    ]
    return Frame(rows)


def serve() -> Frame:
    """`gradmem serve` under clients that ask one question after the other."""
    rows = [
        {
            "clients": row["clients"],
            "requests a second": f"{row['requests_per_second']:.1f}",
            "half are answered after": spans(row["p50_ms"]),
            "95 % after": spans(row["p95_ms"]),
            "errors": f"{row['errors']:.0f}",
            "other answers than alone": f"{row['wrong']:.0f}",
        }
        for _, row in read("serve", method="asking").iterrows()
    ]
    return Frame(rows)


def engines() -> Frame:
    """Engines and Transformers in the same process: requests per second, and how many answers agree."""
    names, rows = {"vllm": "vLLM", "llama_cpp": "llama.cpp"}, []
    for (engine, dtype), found in read("engines").groupby(["engine", "dtype"], sort=False):
        by = found.drop_duplicates("method", keep="last").set_index("method")
        heads = {"one by one": "one by one", "batched": "batched", engine: "by the engine"}
        speeds = {head: f"{by['requests_per_second'][way]:.2f}" for way, head in heads.items()}
        alike = {"answers as in the same type": "same", "as in float32": "same_float32"}
        counts = {head: f"{by[key][engine]:.0f} of {by['asked'][engine]}" for head, key in alike.items()}
        rows.append({"engine": names[engine], "in": dtype} | speeds | counts)
    return Frame(rows)


# ---------------------------------------------------------------- WRITE and READ


def write_time() -> Frame:
    """WRITE on one H100, bf16; several figures are of several runs."""
    table = in_order(read("write_compare", hardware=H100, dtype="bfloat16"), list(HOW))
    return grid(table, table["method"].map(HOW), shapes(table), time_and_memory, "one H100, bf16")


def write_time_cpu() -> Frame:
    """WRITE on two cores of several processors, where there are no CUDA graphs."""
    table = read("write_compare")
    table = in_order(table[table["hardware"].str.contains("threads")], list(HOW))
    names = HOW | {"plain": "plain", "compiled": "layers compiled"}
    heads = [
        f"{row['hardware'].partition(',')[0]}, torch {row['torch'].partition('+')[0]}, {row['dtype']}, {shape(row)}"
        for _, row in table.iterrows()
    ]
    return grid(table, table["method"].map(names), heads, time_and_memory, "two cores")


def write_many() -> Frame:
    """WRITE of 100 contexts of mixed lengths, including first calls and compilation."""
    table = read("write_many")
    table["seconds"] = table["milliseconds"] / 1000
    heads, corner = ["time, peak memory"] * len(table), "100 contexts of 200 to 1,000 tokens, K=5, one H100"
    return grid(table, table["method"], heads, "{seconds:.1f} s, {peak_gib:.1f} GiB", corner)


def write_sizes() -> Frame:
    """WRITE of Llama-3.1-8B's shape within memory budgets, compiled, on one H200."""
    table = read("write_sizes", shape="llama-3.1-8b").dropna(subset=["milliseconds"])
    rows = []
    for _, row in table.drop_duplicates(["batch", "length", "max_memory_gib"], keep="last").iterrows():
        bounded = row["max_memory_gib"] == row["max_memory_gib"]
        again = f"{row['recomputed']:.0f} layers" if row["recomputed"] else None
        rows.append({
            "contexts": f"{row['batch']} x {row['length']:,} tokens",
            "may take": f"{row['max_memory_gib']:g} GiB" if bounded else None,
            "takes": f"{row['peak_gib']:.1f} GiB",
            "time": spans(row["milliseconds"]),
            "of the matmul rate": f"{100 * row['share_of_matmul']:.0f} %",
            "computed again": f"{again}, inputs on the CPU" if row["offloaded"] else again,
        })  # fmt: skip
    return Frame(rows)


def write_limits() -> Frame:
    """The memory of a process that writes within a limit, and what it still holds after many shapes, on one H200."""
    rows = [
        {
            "Llama-3.1-8B's shape": f"{row['length']:,} tokens written and a question answered, weights included",
            "may take": f"{row['process_limit_gib']:g} GiB",
            "takes": f"{row['process_gib']:.1f} GiB",
            "time": spans(row["milliseconds"]),
        }
        for _, row in read("write_sizes_process", shape="llama-3.1-8b").iterrows()
    ]
    rows += [
        {
            "Llama-3.1-8B's shape": f"still held after {row['shapes']} shapes were written twice, weights not included",
            "takes": f"{row['held_gib']:.1f} GiB",
        }
        for _, row in read("write_sizes_held", shape="llama-3.1-8b").iterrows()
    ]
    return Frame(rows)


def bulk_write() -> Frame:
    """Texts that processes, each with a GPU, write into one memory store."""
    rows = []
    for _, row in read("bulk_write", hardware=H200).iterrows():
        fewest, most = row["words"]
        rows.append({
            "processes, an H200 each": row["processes"],
            "texts of": f"{fewest} to {most} tokens, K={row['write_steps']:.0f}, {row['dtype']}, {row['method']}",
            "texts a second": f"{row['documents_per_second']:.0f}",
            "tokens a second": f"{row['tokens_per_second']:,.0f}",
            "commit": row["commit"],
        })  # fmt: skip
    return Frame(rows)


def write_share() -> Frame:
    """How close WRITE comes to the speed of a large matrix product, on one H200; `last_loss=False`."""
    table = read("write_compare", hardware=H200, method="compiled, no last loss")
    return Frame([
        {
            "shape": shape_title(row),
            "WRITE of": shape(row),
            "time": spans(row["milliseconds"]),
            "takes": f"{row['peak_gib']:.1f} GiB",
            "of the matmul rate": f"{100 * row['share_of_matmul']:.0f} %",
        }
        for _, row in table.iterrows()
    ])  # fmt: skip


def write_growth() -> Frame:
    """Time and memory of the compiled WRITE against tokens and write steps."""
    table = read("write_growth").dropna(subset=["milliseconds"])
    rows = [f"{batch} context{'s' * (batch > 1)}" for batch in table["batch"]]
    heads = [f"{row['length']:,} tokens, K={row['write_steps']:.0f}" for _, row in table.iterrows()]
    return grid(table, rows, heads, "{milliseconds:.0f} ms, {peak_gib:.2f} GiB", "one H100, bf16")


def read_time() -> Frame:
    """Time to the first token of an answer, with and without memory."""
    names = {
        "plain": "no memory",
        "memory": "memory, its prefix computed anew",
        "kept prefix": "memory, its prefix kept",
    }
    table = in_order(read("read", hardware=H100, new_tokens=8), list(names))
    heads = [f"{row['query_tokens']} tokens, {row['batch']} at a time" for _, row in table.iterrows()]
    return grid(table, table["method"].map(names), heads, "{first_token_ms:.0f} ms", "one H100, bf16")


def decoding() -> Frame:
    """Answers of 64 tokens with a growing and with a static cache, on one H200."""
    names = {
        "default": "default: a cache that grows",
        "static, step by step": "a static cache, launched kernel by kernel",
        "static": "a static cache, a step as one CUDA graph",
    }
    table = in_order(read("decode", hardware=H200, dtype="bfloat16"), list(names))
    heads = [f"{shape_title(row)}, {row['batch']} at a time" for _, row in table.iterrows()]
    cell = "{milliseconds:,.0f} ms, {token_ms:.1f} ms a token"
    return grid(table, table["method"].map(names), heads, cell, "64 tokens each, bf16")


def shape_title(row: Any) -> str:
    """The name of a record's model shape in tables."""
    return SHAPES.get(row.get("shape"), "SmolLM2-135M")


def prompting(which: str) -> Frame:
    """Records that compare memory with the whole context before the question, one for each context length.

    Args:
        which (`str`): a key of `PROMPTING`.
    """
    table = read("versus_prompting", kind="answer", **PROMPTING[which]).dropna(subset="state_bytes")
    return table.drop_duplicates("context_tokens", keep="last").sort_values("context_tokens")


def _prompting(which: str) -> Frame:
    rows = []
    for _, row in prompting(which).iterrows():
        pays, pressed = row.get("break_even_prefill"), row.get("first_token_press_ms")
        rows.append({
            "context tokens": f"{row['context_tokens']:,}",
            "kept: state": megabytes(row["state_bytes"]),
            "kept: KV cache": megabytes(row["context_kv_bytes"]),
            "WRITE": spans(row["write_ms"]),
            "prefill": spans(row["prefill_ms"]),
            "first token from memory": spans(row["first_token_memory_ms"]),
            "its prefix kept": spans(row["first_token_memory_kept_ms"]),
            "context's cache kept": spans(row["first_token_kept_ms"]),
            "a cache of the state's bytes, by kvpress": None if pd.isna(pressed) else spans(pressed),
            "context read anew": spans(row["first_token_prefill_ms"]),
            "pays after": f"{pays:.1f} questions" if isinstance(pays, int | float) and pays == pays else None,
        })  # fmt: skip
    return Frame(rows).dropna(axis="columns", how="all")


def versus_prompting() -> Frame:
    """Memory against the whole context before the question, on two CPU cores."""
    return _prompting("cpu")


def versus_prompting_gpu() -> Frame:
    """The same on one H100 that ran nothing else."""
    return _prompting("gpu").drop(columns="pays after")


def versus_prompting_8b() -> Frame:
    """The same for Llama-3.1-8B's shape on one H200."""
    return _prompting("8b")


def versus_prompting_1_7b() -> Frame:
    """The same for SmolLM2-1.7B's shape on one H200."""
    return _prompting("1.7b")


def memory_at_8b() -> Frame:
    """The same, shortened for the README."""
    table = prompting("8b")
    row = table[table["context_tokens"] == 8192].iloc[0]
    rows = {
        "kept for each text": [megabytes(row["state_bytes"]), megabytes(row["context_kv_bytes"]), None],
        "made, once, in": [spans(row["write_ms"]), spans(row["prefill_ms"]), None],
        "first token of an answer after": [
            spans(row[f"first_token_{name}_ms"]) for name in ("memory_kept", "kept", "prefill")
        ],
    }
    heads = ["memory state", "KV cache, kept", "text, read anew"]
    table = Frame.from_dict(rows, orient="index", columns=heads)
    return table.rename_axis(f"{row['context_tokens']:,} tokens").reset_index()


def versus_prompting_decoding() -> Frame:
    """Tokens a second and memory of several answers at a time."""
    table = read("versus_prompting", kind="decode", hardware=H100)
    return _decoding(table[table["date"] == table["date"].max()])


def versus_prompting_decoding_8b() -> Frame:
    """The same for Llama-3.1-8B's shape on one H200; several rates are of several runs."""
    return _decoding(read("versus_prompting", kind="decode", **PROMPTING["8b"]))


def _decoding(table: Frame) -> Frame:
    def cell(found: Frame) -> str:
        rates = ", ".join(f"{rate:,.0f}" for rate in found["tokens_per_second"])
        return f"{rates} tokens/s, {found['peak_gib'].max():.2g} GiB"

    table = table[table["batch"].isin([1, 8, 64])].dropna(subset=["tokens_per_second"])
    rows = ["from memory" if row["method"] == "memory" else f"context of {row['context_tokens']:,} tokens"
            for _, row in table.iterrows()]  # fmt: skip
    return grid(table, rows, [f"{batch:.0f} at a time" for batch in table["batch"]], cell)


# ---------------------------------------------------------------- training


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
    bulk_write, choice, decoding, engines, kv_step, memory_at_8b, meta_gradient_accuracy, meta_gradient_cost,
    meta_gradient_kinks, read_time, serve, service, train_step, train_step_lora, training_speed, versus_prompting,
    versus_prompting_1_7b, versus_prompting_8b, versus_prompting_decoding, versus_prompting_decoding_8b,
    versus_prompting_gpu, write_growth, write_limits, write_many,
    write_share, write_sizes, write_time, write_time_cpu,
)  # fmt: skip
