"""Tables of the time and memory of WRITE, READ, memory stores and servers."""

from __future__ import annotations

from .cells import Frame, grid, in_order, percent, read, time_and_memory
from .hardware import H100, H200, shape, shape_title, shapes, spans

HOW = {
    "textbook": "textbook (its graph kept)", "textbook, no graph": "textbook, no graph kept",
    "plain": "plain (launched kernel by kernel)", "compiled": "compiled, one CUDA graph per pass",
    "compiled, no last loss": "the same with `last_loss=False`",
}  # fmt: skip
"""Labels of the ways to WRITE."""


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
        "memory": "memory, its prefix computed again",
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


TABLES = (
    bulk_write,
    choice,
    decoding,
    engines,
    read_time,
    serve,
    service,
    write_growth,
    write_limits,
    write_many,
    write_share,
    write_sizes,
    write_time,
    write_time_cpu,
)
