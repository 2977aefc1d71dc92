"""Questions about a story from a test set, some of them unanswerable: answers from memory, and from the text."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.store import MemoryStore
from gradmem_adapter.utils.kv_cache import kv_cache_bytes
from gradmem_adapter.utils.wording import counted


def run_story_demo(
    checkpoint: str | Path, *, backbone: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Answer the questions that ship with the package from memory, and compare with answers from the whole text.

    Returns the figures.

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
    ids = pipeline.tokenizer(story["context"], return_tensors="pt")["input_ids"].to(model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    with TemporaryDirectory() as folder:
        store, longest = MemoryStore(folder), model.active_peft_config.segment_tokens or ids.shape[1]
        memory = store.get(store.add_document(pipeline, story["context"], segment_tokens=longest))
        state_bytes = sum(entry.nbytes for entry in store.entries())
    from_memory = [pipeline.surest_answer(question, memory=memory, **options) for question in questions]
    prompts = [[{"role": "user", "content": f"{story['context']}\n\n{question}"}] for question in questions]
    from_text = pipeline.generate(prompts, **options)
    figures: dict[str, Any] = {
        "from_memory": [answer.text.strip() for answer in from_memory],
        "support": [round(answer.score, 3) for answer in from_memory],
        "from_text": [answer.strip() for answer in from_text],
        "targets": story["targets"],
        "context_tokens": ids.shape[1],
        "states": len(memory),
        "memory_tokens": memory.num_memory_tokens,
        "state_bytes": state_bytes,
        "kv_cache_bytes": kv_cache_bytes(model.get_base_model(), ids),
    }
    table = Table("asked", "from memory, the story gone", "support", "by the backbone alone, with the story", "right")
    right = story["targets"] + ["(the story does not say)"] * len(story["elsewhere"])
    support = [f"{score:.2f}" for score in figures["support"]]
    for row in zip(questions, figures["from_memory"], support, figures["from_text"], right, strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(
        f"{counted(figures['context_tokens'], 'token')} in {counted(figures['states'], 'state')} of "
        f"{counted(figures['memory_tokens'], 'vector')}: {figures['state_bytes']:,} bytes in a memory store, where the "
        f"KV cache of the story takes {figures['kv_cache_bytes']:,} bytes "
        f"({figures['kv_cache_bytes'] / figures['state_bytes']:.0f} times as many)."
    )
    return figures
