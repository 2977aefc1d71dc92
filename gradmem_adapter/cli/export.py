"""`gradmem export` and `gradmem export-states`: an adapter and its states for other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from gradmem_adapter.cli.options import BACKBONE, CHECKPOINT, JSON, check_used, print_json
from gradmem_adapter.utils.files import check_writable, replacing
from gradmem_adapter.utils.shipped import QA
from gradmem_adapter.utils.wording import counted

Type: TypeAlias = Literal["float32", "bfloat16", "float16"]


def export(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A trained adapter, as for ask.")],
    directory: Annotated[Path, typer.Argument(file_okay=False, help="A new or empty directory for the model.")],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--lora", help="Merge the LoRA into the weights, or write it beside them, to the folder lora."
        ),
    ] = True,
    dtype: Annotated[Type, typer.Option(help="Type of the weights.")] = "float32",
    gguf: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(help="Also write model.gguf for llama.cpp, with its own converter."),
    ] = None,
    backbone: Annotated[str | None, BACKBONE] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Export the model that answers from memory as a plain Hugging Face directory, for vLLM and other engines."""
    check_used(context, "--merge", merge, "gguf")
    import torch

    from gradmem_adapter import load_checkpoint
    from gradmem_adapter.export import export_model

    model, tokenizer = load_checkpoint(checkpoint, backbone=backbone, dtype=getattr(torch, dtype))
    export_model(model, tokenizer, directory, merge=merge, gguf=gguf)
    figures = {"directory": str(directory), "fingerprint": model.fingerprint(), "vectors": model.prefix_length}
    if as_json:
        print_json(figures)
    else:
        typer.echo(
            f"{directory} answers from states of model {figures['fingerprint']}, "
            f"{counted(model.prefix_length, 'vector')} each."
        )


def export_states(
    states: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Memory states, from gradmem write.")],
    output: Annotated[Path, typer.Argument(dir_okay=False, help="A file for JSON lines, one per state.")],
    checkpoint: Annotated[str, CHECKPOINT] = QA,
    backbone: Annotated[str | None, BACKBONE] = None,
    dtype: Annotated[Type, typer.Option(help="Type of the vectors; bfloat16 halves the lines.")] = "float32",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Export memory states for vLLM's API, as prompt_embeds in base64."""
    import torch

    from gradmem_adapter import MemoryState, load_checkpoint
    from gradmem_adapter.export import prompt_embeds

    if output.exists():
        raise FileExistsError(f"{output} exists. Name another file.")
    check_writable(output)
    memory = MemoryState.load(states)
    model, _ = load_checkpoint(checkpoint, backbone=backbone)
    rows = [
        {"context_tokens": int(tokens), "fingerprint": memory.fingerprint, "prompt_embeds": text}
        for tokens, text in zip(memory.context_tokens, prompt_embeds(model, memory, getattr(torch, dtype)), strict=True)
    ]
    with replacing(output) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if as_json:
        print_json({"output": str(output), "states": len(rows), "fingerprint": memory.fingerprint})
    else:
        typer.echo(
            f"{output} has {counted(len(rows), 'state')} for an engine that serves the model exported from "
            f"{checkpoint}."
        )
