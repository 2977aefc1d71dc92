"""Recital: a language model writes a paragraph into a few vectors and recites it from these alone."""

from __future__ import annotations

import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import set_seed

from gradmem_adapter.backbones import SMOLLM2, load_backbone
from gradmem_adapter.cli.options import visible
from gradmem_adapter.cli.reading import whole
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.kv_cache import kv_cache_bytes
from gradmem_adapter.utils.wording import counted

MIN_TOKENS = 40
"""Texts with fewer tokens would show little."""
LR = 0.03
"""Write learning rate of Adam. The slots are not trained, so WRITE needs the steps that meta-training would save."""


def demo_text(path: Path | None = None) -> str:
    """The paragraph to write: the one that ships with the package, or the content of a file."""
    if path is not None:
        return whole(str(path)).strip()
    return files("gradmem_adapter").joinpath("data/demo.txt").read_text(encoding="utf-8").strip()


def run_recite_demo(
    text: str,
    *,
    backbone: str = SMOLLM2,
    memory_tokens: int | None = None,
    steps: int = 300,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write `text` into a memory state, save and load it, and decode it greedily without the text. Returns figures.

    Args:
        text (`str`): a text of at least 40 tokens.
        backbone (`str`, *optional*, defaults to `SMOLLM2`): see `load_backbone`.
        memory_tokens (`int`, *optional*): m, at most a quarter of the text's tokens; None: a fifth.
        steps (`int`, *optional*, defaults to `300`): the most write steps; WRITE stops when every token is recovered.
        seed (`int`, *optional*, defaults to `0`): seed of the first memory.
        console (`Console`, *optional*): where to print.

    Raises:
        ValueError: the text is too short or too long, or there are more vectors than a quarter of its tokens.
    """
    console = console or Console()
    with console.status(Text(f"Loading {backbone}")):
        causal_lm, tokenizer = load_backbone(backbone)
        set_seed(seed)
    ids = tokenizer(text)["input_ids"]
    count = len(ids)
    if count < MIN_TOKENS:
        raise ValueError(
            f"The text has {counted(count, 'token')}, but the demo needs at least {MIN_TOKENS}. Pass a longer one."
        )
    memory_tokens = count // 5 if memory_tokens is None else memory_tokens
    if not 1 <= memory_tokens <= count // 4:
        raise ValueError(
            f"Got {counted(memory_tokens, 'memory token')} for {counted(count, 'text token')}: the demo takes from 1 "
            f"to {count // 4}, a quarter of the tokens."
        )
    # Without meta-training, slots that start as token embeddings need far fewer write steps than noise.
    config = GradMemConfig(num_memory_tokens=memory_tokens, memory_init="vocab", write_optimizer="adam")
    model = get_peft_model(causal_lm, config)
    pipeline = GradMemPipeline(model.eval(), tokenizer)
    console.print(Panel(Text(visible(text)), title=f"The text: {counted(count, 'token')}"))

    started = time.perf_counter()
    state = _write_with_progress(pipeline, text, steps, console)
    write_seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.safetensors"
        state.save(path)
        state_bytes = path.stat().st_size
        state = MemoryState.load(path)
    recited = pipeline.reconstruct(state)[0]
    original = tokenizer.decode(ids, skip_special_tokens=True)  # what a perfect recital decodes to
    console.print(
        Panel(Text(visible(recited)), title=f"Recited from {counted(memory_tokens, 'vector')}, the text gone")
    )

    cache_bytes = kv_cache_bytes(model.get_base_model(), torch.tensor([ids]))
    console.print(
        f"The state on disk takes {state_bytes:,} bytes; the KV cache of the same text takes {cache_bytes:,} bytes "
        f"({cache_bytes / state_bytes:.1f} times as many)."
    )
    return {
        "reconstructed": recited == original,
        "context_tokens": count,
        "memory_tokens": memory_tokens,
        "state_bytes": state_bytes,
        "kv_cache_bytes": cache_bytes,
        "write_seconds": round(write_seconds, 1),
    }


def _write_with_progress(pipeline: GradMemPipeline, text: str, steps: int, console: Console) -> MemoryState:
    """WRITE with a bar that shows the write loss and the share of tokens recovered."""
    columns = (
        TextColumn("Writing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("step {task.fields[step]}, write loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("write", total=1.0, step=0, loss=float("nan"))

        def show(now: WriteProgress) -> None:
            progress.update(
                task, completed=now.recovered.item(), step=now.step, loss=now.losses.item(), refresh=now.step % 10 == 0
            )

        return pipeline.write(text, steps=steps, lr=LR, stop_when_recovered=True, callback=show)
