"""Questions about a story of a test set, and some that it does not answer, from memory and beside it from the text."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.utils.kv_cache import kv_cache_bytes


def run_story_demo(
    checkpoint: str | Path, *, backbone: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Answer the questions that ship with the package from memory, beside the backbone's answers from the whole text.

    Returns the figures.

    Args:
        checkpoint (`str` or `Path`): what `load_checkpoint` opens, an adapter trained on questions.
        backbone (`str`, *optional*): as for `load_checkpoint`.
        console (`Console`, *optional*): where to print.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    console = console or Console()
    story = json.loads(files("gradmem_adapter").joinpath("data/story.json").read_text(encoding="utf-8"))
    with console.status(Text(f"Loading {checkpoint}")):
        pipeline = GradMemPipeline(*load_checkpoint(checkpoint, backbone=backbone))
    model, questions = pipeline.model, story["questions"] + story["elsewhere"]
    console.print(Panel(Text(story["context"]), title="A story"))
    console.print(Text(story["source"], style="dim"))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    memory = pipeline.write(story["context"])
    from_memory = pipeline.generate(questions, memory=memory, return_scores=True, **options)
    prompts = [[{"role": "user", "content": f"{story['context']}\n\n{question}"}] for question in questions]
    from_text = pipeline.generate(prompts, **options)
    ids = pipeline.tokenizer(story["context"], return_tensors="pt")["input_ids"].to(model.device)
    figures: dict[str, Any] = {
        "from_memory": [answer.text.strip() for answer in from_memory],
        "support": [round(answer.score, 3) for answer in from_memory],
        "from_text": [answer.strip() for answer in from_text],
        "targets": story["targets"],
        "context_tokens": ids.shape[1],
        "memory_tokens": memory.num_memory_tokens,
        "state_bytes": len(memory.to_bytes()),
        "kv_cache_bytes": kv_cache_bytes(model.get_base_model(), ids),
    }
    table = Table("asked", "from memory, the story gone", "support", "by the backbone alone, with the story", "right")
    right = story["targets"] + ["(the story does not say)"] * len(story["elsewhere"])
    support = [f"{score:.2f}" for score in figures["support"]]
    for row in zip(questions, figures["from_memory"], support, figures["from_text"], right, strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(
        "{context_tokens} tokens are in {memory_tokens} vectors: {state_bytes:,} bytes on disk, where the KV cache of "
        "the story takes {kv_cache_bytes:,} bytes ({ratio:.0f} times as many).".format(
            **figures, ratio=figures["kv_cache_bytes"] / figures["state_bytes"]
        )
    )
    return figures
