"""Tables that compare memory with the whole context before the question."""

from __future__ import annotations

import pandas as pd

from .cells import Frame, grid, read
from .hardware import H100, H200, megabytes, spans

PROMPTING = {
    "8b": {"shape": "llama-3.1-8b", "hardware": H200},
    "1.7b": {"shape": "smollm2-1.7b", "hardware": H200},
    "0.5b": {"shape": "qwen2.5-0.5b", "hardware": H200},
    "gpu": {"hardware": H100, "date": "2026-11-25"},  # when it ran nothing else
    "cpu": {"hardware": "Intel(R) Xeon(R) Processor, 2 threads"},
}
"""Where memory is compared with the whole context before the question, for tables and plots."""


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
            "context read again": spans(row["first_token_prefill_ms"]),
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
    heads = ["memory state", "KV cache, kept", "text, read again"]
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


TABLES = (
    memory_at_8b,
    versus_prompting,
    versus_prompting_1_7b,
    versus_prompting_8b,
    versus_prompting_decoding,
    versus_prompting_decoding_8b,
    versus_prompting_gpu,
)
