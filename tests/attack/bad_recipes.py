"""Command lines of `python -m evaluation` that cannot work."""

from __future__ import annotations

from collections.abc import Iterator

from bad_inputs import CONFIGS, DEVICES, NO_TEXTS, ROWS, YAML

RECIPE_FIELDS = [
    "colour=red", "tasks=[]", "tasks=3", "tasks.0=x", "tasks.1.name=x", "tasks.0.name=what", "tasks.0.colour=red",
    "tasks.0.pairs=x", "tasks.x.name=babi", "tasks.0={name: babi}", "tasks.0={name: babi, source: nowhere, number: 2}",
    "tasks.0={name: plain_text, files: [nowhere]}", "backbone=3", "backbone=nowhere/x/y",
    "backbone={layers: 1, width: 7, heads: 2}", "backbone={layers: x}", "method=gradmem", "method={name: best}",
    "method={name: gradmem, colour: red}", "memory.colour=red", "memory.num_memory_tokens=0", "memory=3",
    "memory.write_lr=.nan", "training.colour=red", "training.max_steps=x", "training.learning_rate=.nan",
    "training.write_steps=[-1]", "training.write_steps=[0]", "training.report_to=nobody", "batches.colour=red",
    "init_from=nowhere", "evaluation.write_steps=[-1]", "evaluation.states=[0]", "evaluation=3",
    "trained_minutes=x", "training=null",
]  # fmt: skip


def evaluation_cases() -> Iterator[list[str]]:
    """Those of `python -m evaluation`."""
    train = ["train", "recipe.yaml", "--output", "new"]
    run = ["run", "folder", "--limit", "1"]
    yield from (["what"], ["train"], ["run"], ["compare", "notes.txt"], ["tables", "--colour"])
    yield from (["train", f"{name}.yaml", *train[2:]] for name in (*YAML, "config", "missing"))
    yield from (["train", text, *train[2:]] for text in NO_TEXTS)
    yield from ([*train, "--set", field] for field in RECIPE_FIELDS)
    yield from ([*train, "--output", place] for place in ("notes.txt", "/dev/null", "notes.txt/x", "x" * 300))
    yield from ([*command, "--device", device] for command in (train, run) for device in DEVICES)
    yield from (["run", checkpoint, *run[2:]] for checkpoint in ("folder", "checkpoint", "missing", "notes.txt"))
    yield from (["run", f"recipes/{name}", *run[2:]] for name in CONFIGS)
    yield from (["compare", f"rows {rows}", "rows.jsonl"] for rows in ROWS)
    yield from (["compare", text, "rows.jsonl"] for text in NO_TEXTS)
    yield from (
        [*run, option, number] for option in ("--pairs", "--steps", "--states") for number in ("x", "-1", "1,,2")
    )
    yield from ([*run, "--task", task] for task in ("x", "{", "{name: what}", "[]", YAML["aliases"]))
    yield from ([*run, "--text", text] for text in ("missing", "pipe"))
