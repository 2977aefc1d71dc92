"""Tables of task results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

import pandas as pd

from evaluation.methods import METHODS
from evaluation.paper import KV_RETRIEVAL
from evaluation.results import RESULTS, Record, frame, load_records
from evaluation.tasks.left_out import THRESHOLDS
from gradmem_adapter.store.files import Dtype

from .cells import Frame, data_title, general_passages, grid, in_order, line_title, percent, read

SHARES = {"exact_match", "f1", "rouge_l", "greedy", "teacher_forced", "whole", "auc", "gap_closed"}
"""Metrics shown in %."""
INT8 = 4
"""How many times smaller states are in a memory store than in float32, in which records count bytes."""


def results_table(records: Iterable[Record]) -> Frame:
    """Any measurements of tasks, one per row."""
    rows = []
    for record in records:
        steps = None if METHODS[record.method].step is None else record.write_steps
        settings = {name: value for name, value in record.settings.items() if value is not None}
        where: dict[str, Any] = {"data": record.dataset, **settings, "method": METHODS[record.method].title, "K": steps}
        where |= {"m": record.memory_tokens, "states": record.states}
        scores = {
            name: percent(value, record.errors.get(name, math.nan)) if name in SHARES else f"{value:.3f}"
            for name, value in record.metrics.items()
            if value is not None
        }
        rows.append(where | scores | {"n": record.n})
    return Frame(rows).astype(object)


def kv_retrieval() -> Frame:
    """Exact match % of one set of weights for all numbers of pairs and steps, of the baselines, and of the paper."""
    table = read("kv_retrieval")
    table = table[(table["method"] != "gradmem") | table["trained_steps"].str.contains("-")]
    table = in_order(table.sort_values(["write_steps", "pairs"]), METHODS)
    titles = [line_title(method, steps) for method, steps in zip(table["method"], table["write_steps"], strict=True)]

    def cell(found: Frame) -> str:
        return percent(found["exact_match"].iloc[-1]).replace("100.0", "100")

    own = grid(table, titles, [str(n) for n in table["pairs"]], cell, "pairs")
    lines = [
        {"pairs": f"paper: {name}"} | {str(n): f"{v:g}" for n, v in values.items()} for name, _, values in KV_RETRIEVAL
    ]
    return pd.concat([own, Frame(lines)])


ANSWERS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "bAbI adapter, from 16 vectors, no gradient step (its default)",
        {"method": "gradmem", "memory_tokens": 16, "write_steps": 0},
    ),
    (
        "adapter of 32 vectors, no gradient step",
        {"method": "gradmem", "memory_tokens": 32, "trained_steps": "0-1", "write_steps": 0},
    ),
    (
        "the same, one gradient step",
        {"method": "gradmem", "memory_tokens": 32, "trained_steps": "0-1", "write_steps": 1},
    ),
    ("the whole context before the question", {"method": "full_context"}),
    ("mean-pooled hidden states, 32 vectors", {"method": "mean_pooling"}),
    ("forward-only memory, 32 vectors", {"method": "forward_memory"}),
    ("the first 32 tokens of the text", {"method": "truncated_text", "memory_tokens": 32}),
    ("from the questions alone", {"method": "truncated_text", "memory_tokens": 0}),
)
"""The rows of the table `answers`, with the measurements that each shows."""


def answers() -> Frame:
    """Exact match % on bAbI and F1 on passages, of the bAbI adapter, one of 32 vectors and the baselines."""
    found = []
    for label, where in ANSWERS:
        table = read("answers", split="test", states=1, **where)
        found.append(table.assign(label=f"{label}, trained for {table['training_minutes'].iloc[0]:g} minutes"))
    return _by_dataset(pd.concat(found), "exact match %")


def general() -> Frame:
    """The shipped general adapters and their backbone with the whole context: F1, and exact match on bAbI."""
    return _general(shipped=True)


def general_others() -> Frame:
    """Adapters and baselines that were trained on the same data and are not shipped."""
    return _general(shipped=False)


def _general(shipped: bool) -> Frame:
    table = frame(load_records(RESULTS / "general.jsonl"))
    table = table[(table["states"] == 1) & table["unanswerable"].isna() & (table["write_steps"] != 1)]
    table = table[(table["checkpoint"].notna() | (table["method"] == "full_context")) == shipped]
    table = table.sort_values(["method", "memory_tokens", "write_steps"])

    def label(row: Any) -> str:
        if row["method"] != "gradmem":
            return METHODS[row["method"]].title
        steps = f"{row['write_steps']} gradient step" + "s" * (row["write_steps"] > 1)
        trained = " trained without gradient steps," if row["trained_steps"] == "0" else ""
        return f"{row['memory_tokens']} vectors,{trained} {steps if row['write_steps'] else 'no gradient step'}"

    labels = [label(row) for _, row in table.iterrows()]
    order = sorted(dict.fromkeys(labels), key=lambda name: (METHODS["full_context"].title == name, labels.index(name)))
    return in_order(_by_dataset(table.assign(label=labels), "%"), order, "%")


def general_side_by_side() -> Frame:
    """The general adapters on SQuAD with several states per question: all read side by side, or each by itself."""
    table = read("general", dataset="squad", method="gradmem", write_steps=2, limit=250)
    asked_of_several = table.groupby("memory_tokens")["states"].transform("max") > 1
    table = table[table["unanswerable"].isna() & asked_of_several].sort_values(["memory_tokens", "states"])
    alone = table["alone"].eq(True).map({False: "side by side", True: "each by itself"})
    rows = [f"{vectors} vectors, {how}" for vectors, how in zip(table["memory_tokens"], alone, strict=True)]
    heads = [f"of {states}" if states > 1 else "its own state" for states in table["states"]]
    return grid(table, rows, heads, lambda found: percent(found["f1"].iloc[-1], found["f1_error"].iloc[-1]))


def short_squad() -> Frame:
    """Questions about single sentences that hold the answer."""
    rows = []
    for _, row in read("short_squad", limit=250).iterrows():
        scores = {
            title: percent(row[name], row[f"{name}_error"])
            for title, name in (("exact match", "exact_match"), ("F1", "f1"))
        }
        rows.append({"m": row["memory_tokens"], "K": row["write_steps"]} | scores | {"questions": row["n"]})
    return Frame(rows)


def untouched() -> Frame:
    """Self-study and the whole context, both with the untouched backbone."""
    rows = []
    for _, row in read("untouched", limit=30).iterrows():
        studied = f"{row['memory_tokens']} vectors after {row['write_steps']} steps of self-study"
        what = studied if row["method"] == "gradmem" else METHODS[row["method"]].title
        rows.append({"read": what, "F1": percent(row["f1"], row["f1_error"]), "questions": row["n"]})
    return Frame(rows)


def choosing() -> Frame:
    """F1 of the general adapters on passages, by vectors and write steps."""
    table = general_passages()
    table = table[table["method"] == "gradmem"].sort_values(["memory_tokens", "write_steps", "dataset"])
    rows = [f"{row['memory_tokens']}, {row['write_steps']}" for _, row in table.iterrows()]
    heads = table["dataset"].map(lambda name: f"{data_title(name)} (F1)").tolist()
    found = grid(table, rows, heads, lambda of: percent(of["f1"].iloc[0], of["f1_error"].iloc[0]), "m, K")
    kept = dict(zip(rows, table["bytes_per_context"], strict=True))
    return found.assign(**{"bytes kept": found["m, K"].map(lambda row: f"{kept[row]:,.0f}")})


def answers_side_by_side() -> Frame:
    """The adapter of 32 vectors without gradient steps, with several contexts per question."""
    table = read("answers", split="test", method="gradmem", memory_tokens=32, trained_steps="0-1", write_steps=0)
    table = table.sort_values("states")
    return _by_dataset(table.assign(label=table["states"].astype(str)), "contexts")


def _by_dataset(table: Frame, corner: str) -> Frame:
    """A column for each data set: exact match, and for passages F1."""
    table = table.sort_values("dataset", kind="stable")
    passages = table["task"] == "passages"
    heads = [data_title(name) + " (F1)" * bool(long) for name, long in zip(table["dataset"], passages, strict=True)]
    scores = table["f1"].where(passages, table["exact_match"])
    return grid(table.assign(score=scores.map(percent)), table["label"], heads, "{score}", corner)


def answers_all() -> Frame:
    """All measurements of answers: exact match, on passages also F1 and ROUGE-L, with standard errors."""
    columns = ["memory_tokens", "trained_steps", "states", "write_steps", "dataset"]
    table = in_order(read("answers").sort_values(columns), METHODS)

    def label(row: Any) -> str:
        parts = [METHODS[row["method"]].title_at(row["memory_tokens"])]
        parts += [f"m={row['memory_tokens']}"] if row["memory_tokens"] else []
        parts += [f"K={row['write_steps']}, trained with K={row['trained_steps']}"] if row["trained_steps"] else []
        parts += [f"of {row['states']} contexts side by side"] if row["states"] > 1 else []
        return ", ".join([*parts, f"{row['training_steps']:,} steps"])

    def cell(found: Frame) -> str:
        row = found.iloc[-1]
        names = ("exact_match", "f1", "rouge_l") if row["task"] == "passages" else ("exact_match",)
        return " / ".join(percent(row[name], row[f"{name}_error"]) for name in names)

    return grid(table, [label(row) for _, row in table.iterrows()], table["dataset"].tolist(), cell)


def reconstruction() -> Frame:
    """How much of passages comes back from memory alone, by write steps."""
    rows = []
    for _, row in read("reconstruction").sort_values("write_steps").iterrows():
        nats = (row["next_memory"], row["next_nothing"], row["next_text"])
        rows.append({
            "K": row["write_steps"],
            f"greedy tokens of {row['tokens']}": f"{row['greedy_tokens']:.1f} ± {row['greedy_tokens_error']:.1f}",
            "passages that come back whole": f"{row['whole'] * row['passages']:.0f} of {row['passages']}",
            "teacher-forced %": percent(row["teacher_forced"]),
            "write loss, nats a token": f"{row['write_loss']:.2f}",
            "perplexity of the next passage: with memory / with nothing / with the text":
                " / ".join(f"{math.exp(value):.0f}" for value in nats),
        })  # fmt: skip
    return Frame(rows)


def continuation() -> Frame:
    """How much the preceding passage helps to predict the text that follows."""
    rows = []
    for _, row in read("continuation").iterrows():
        nats = {
            title: f"{row[name]:.2f} ± {row[f'{name}_error']:.2f}"
            for title, name in (("in memory", "next_memory"), ("gone", "next_nothing"), ("as text", "next_text"))
        }
        where = {"adapter": row["checkpoint"], "m": row["memory_tokens"], "K": row["write_steps"]}
        rows.append(where | {"passages": row["passages"]} | nats | {"gap closed %": percent(row["gap_closed"])})
    return Frame(rows)


EARLIER = " ¹"
"""Marks measurements with weights earlier than the shipped ones."""


def long_documents() -> Frame:
    """F1 on questions about articles of thousands of words, by which part of an article is read."""
    rows = []
    for _, row in read("long_documents", limit=48).iterrows():
        kept = row["bytes_per_context"] / INT8 / row["context_tokens"]
        rows.append({
            "read": _what_is_read(row) + EARLIER * str(row["checkpoint"]).startswith("before"),
            "kB for 1,000 tokens": f"{kept:,.0f}" if row["method"] == "gradmem" else None,
            "questions": f"{row['n']:,}",
            "F1": percent(row["f1"], row["f1_error"]),
            "exact match": percent(row["exact_match"], row["exact_match_error"]),
        })  # fmt: skip
    return Frame(rows)


def left_out() -> Frame:
    """How many questions a threshold of support refuses: those that a long text does not answer, and the others."""
    rows = []
    for _, row in read("left_out", limit=16).iterrows():
        for threshold in THRESHOLDS:
            refused = {
                f"refused {which} the answer %": percent(row[name], row[f"{name}_error"])
                for which, name in (("without", f"left_out_below_{threshold}"), ("with", f"whole_below_{threshold}"))
            }
            rows.append({"vectors": row["memory_tokens"], "support below": f"{threshold}"} | refused)
    return Frame(rows)


def _what_is_read(row: Any) -> str:
    vectors = f"({row['memory_tokens']} vectors)"
    if row["pieces"] == "whole":
        return f"the article as text, {row['context_tokens']:,.0f} tokens on average"
    if row["pieces"] == "sequential":
        return f"one state of all segments, one after another {vectors}"
    if row["chosen"] == "right":
        return f"the state of the paragraph that answers {vectors}"
    if row["method"] == "full_context":
        return f"{row['states']} pieces of text of {row['context_tokens']:.0f} tokens, side by side"
    of = "paragraphs" if row["pieces"] == "paragraphs" else f"segments of up to {row['segment_tokens']:.0f} tokens"
    how = "" if row["states"] == 1 else ", the likeliest answers" if row["alone"] is True else ", side by side"
    return f"{row['states']} of the states {vectors} of {of}{how}"


def kept_states() -> Frame:
    """F1 on SQuAD by the dtype in which states are kept."""
    table = in_order(read("kept_states", limit=250), get_args(Dtype), "kept")
    rows = [f"{vectors} vectors" for vectors in table["memory_tokens"]]
    return grid(table, rows, table["kept"].tolist(), lambda row: percent(row["f1"].iloc[0], row["f1_error"].iloc[0]))


TABLES = (
    answers, answers_all, answers_side_by_side, choosing, continuation, general, general_others, general_side_by_side,
    kept_states, kv_retrieval, left_out, long_documents, reconstruction, short_squad, untouched,
)  # fmt: skip
