"""Check every type of Transformers' causal-LM mapping, each in its own process."""

from __future__ import annotations

import hashlib
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import gradmem_adapter
from evaluation.backbones.check import check
from evaluation.results import Record, add_records, load_records

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sweep(
    path: Path, model_types: Sequence[str] = (), jobs: int = 1, limit: float = 300.0, show: Callable[[str], Any] = print
) -> list[Record]:
    """Check types of causal LMs and record the findings. Types already checked with the same code are skipped.

    Args:
        path (`Path`): the file of records.
        model_types (`Sequence[str]`, *optional*): check these, even if they were checked before. Defaults to all.
        jobs (`int`, *optional*, defaults to 1): how many to check at a time.
        limit (`float`, *optional*, defaults to 300): the most seconds for one type.
        show (`Callable`, *optional*): called with a line for each type.

    Returns:
        `list[Record]`: the records of all types in the file.

    Raises:
        ValueError: Transformers has no such type.
    """
    if unknown := sorted(set(model_types) - set(MODEL_TYPES)):
        raise ValueError(f"Transformers has no causal LM of type {', '.join(unknown)}.")
    made_by = {name: version(name) for name in ("transformers", "torch", "peft")} | {"source": source_digest()}
    known = {record.dataset for record in load_records(path) if made_by.items() <= record.facts.items()}
    wanted = model_types or [name for name in MODEL_TYPES if name not in known]
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(isolated, name, limit): name for name in wanted}
        for future in as_completed(futures):
            found, name = future.result(), futures[future]
            errors = {key: float(f"{value:.1e}") for key, value in found.pop("errors", {}).items()}
            metrics = {key: value if value < float("inf") else None for key, value in errors.items()}
            add_records(path, [Record("models", "gradmem", dataset=name, metrics=dict(metrics), facts=found | made_by)])
            show(f"{name}: {found['verdict']} {found.get('reason', '')}".strip())
    return load_records(path)


def isolated(model_type: str, limit: float) -> dict[str, Any]:
    """Run `check` in its own process, which may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluation.cli"])  # import once what each process needs
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"verdict": "crashes", "reason": f"takes more than {limit:.0f} seconds"}
        return dict(receiver.recv())
    except EOFError:
        process.join()
        return {"verdict": "crashes", "reason": f"its process ends with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(model_type: str, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    sender.send(check(model_type))


def source_digest() -> str:
    """A digest of all code that the result depends on, except libraries."""
    digest = hashlib.sha256()
    for folder in (Path(gradmem_adapter.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
