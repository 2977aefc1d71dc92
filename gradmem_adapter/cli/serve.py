"""`gradmem serve`: memories over HTTP, and answers from them through OpenAI's API."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from gradmem_adapter.cli.options import BACKBONE, DEVICE, check_used, chosen_device, writable_store
from gradmem_adapter.utils.files import FULL

KEYS = """A file with a tenant and its key on each line; each tenant sees only its own memories. Without it, anyone
who reaches the server may use it."""


def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A trained adapter, as for ask.")],
    store: Annotated[Path, typer.Option(file_okay=False, help="A directory for the memories.")],
    reader: Annotated[Literal["transformers", "vllm"], typer.Option(help="What answers from memory.")] = "transformers",
    url: Annotated[str | None, typer.Option(help="vllm: the address of its server.")] = None,
    engine_model: Annotated[
        str | None, typer.Option(help="vllm: its name for the model; default: the first it lists.")
    ] = None,
    engine_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="vllm: the key for its server.")] = None,
    keys: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help=KEYS)] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines can reach needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    max_writes: Annotated[
        int, typer.Option(min=1, help="The most texts being written or waiting; further ones are told to retry.")
    ] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="The most prompts answered together.")] = 16,
    max_body: Annotated[int, typer.Option(min=1, help="The most bytes in a request.")] = 4 * 2**20,
    segment_tokens: Annotated[
        int | None, typer.Option(help="The most tokens in a segment; default: two per memory vector.")
    ] = None,
    backbone: Annotated[str | None, BACKBONE] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Write memories and answer from them over HTTP: POST /v1/memories, and OpenAI's API with `memory` in the body."""
    from gradmem_adapter import GradMemPipeline, MemoryStore, load_checkpoint
    from gradmem_adapter.segments import unknown_length

    check_used(context, "--reader vllm", reader == "vllm", "engine_model", "engine_key")
    try:
        from gradmem_adapter.serve import (
            TENANTS,
            Limits,
            Tenants,
            check_address,
            create_app,
            is_loopback,
            run,
            store_of,
            unseen,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}. Install the server: pip install "gradmem-adapter[serve]".') from error
    tenants = Tenants() if keys is None else Tenants.from_file(keys)
    if not tenants and not is_loopback(host):
        raise ValueError(
            f"On {host}, other machines could read and delete all memories. Pass --keys FILE, with a tenant and a key "
            "on each line, or leave --host out."
        )
    if (reader == "vllm") != (url is not None):
        raise ValueError("--reader vllm needs --url, the address of its server, and --url needs --reader vllm.")
    check_address(host, port)
    served = MemoryStore(store).exists() or (store / TENANTS).exists()
    for path in sorted({store, *(store_of(store, name).path for name in tenants.names)}):
        _check_store(path, beside=(TENANTS,), served=served)
    model, tokenizer = load_checkpoint(checkpoint, backbone=backbone, device=chosen_device(device))
    engine = None
    if url is not None:
        from gradmem_adapter.export.vllm import VLLMReader

        engine = VLLMReader(model, url, name=engine_model, api_key=engine_key)
    pipeline = GradMemPipeline(model, tokenizer, reader=engine)
    if segment_tokens is None and model.active_peft_config.segment_tokens is None:
        remedy = "pass --segment-tokens. Without it, this server writes no texts; stored memories can be asked."
        warnings.warn(unknown_length(remedy), stacklevel=2)
    else:
        pipeline.segments("", segment_tokens)  # checks the number before clients are served
    for told in unseen(store, tenants, model.fingerprint()):
        warnings.warn(told, stacklevel=2)
    limits = Limits(writes=max_writes, batch=max_batch, body_bytes=max_body)
    app = create_app(
        pipeline,
        store,
        model=Path(checkpoint).resolve().name,
        tenants=tenants,
        limits=limits,
        segment_tokens=segment_tokens,
        host=host,
    )
    page = f", and with a browser at http://{host}:{port}" if port else ""
    typer.echo(f"Serving {Path(checkpoint).name} with the memories in {store}, for OpenAI's clients{page}.", err=True)
    run(app, host=host, port=port, grace=limits.grace)


def _check_store(path: Path, beside: Collection[str], served: bool) -> None:
    """Raise unless a memory store can be served. A read-only store is served with a warning if the server's folder
    holds any memories."""
    try:
        writable_store(path, keep_text=True, beside=beside)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, *FULL) or not served:
            raise
        warnings.warn(f"{path} {error.strerror}. Memories can be asked, but not added or deleted.", stacklevel=2)
