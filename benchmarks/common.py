"""What all benchmarks share: models, measuring, tables, CSV files and plots."""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gradmem_adapter import load_backbone

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"
SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    result.add_argument(
        "--model",
        default="random",
        help="a name on the hub, a directory or package:<package>/<file>.gguf; 'random': SmolLM2-135M's shape with "
        "random weights (what things cost does not depend on the weights)",
    )
    result.add_argument("--layers", type=int, help="of a random model, to try the benchmark out")
    result.add_argument("--output", type=Path, default=RESULTS / f"{name}.csv", help="a CSV file that rows go to")
    return result


def backbone(args: argparse.Namespace, attention: str = "sdpa") -> PreTrainedModel:
    """The model that `--model`, `--dtype` and `--device` ask for."""
    dtype = DTYPES[args.dtype]
    if args.model == "random":
        torch.manual_seed(0)
        fields: dict[str, Any] = SMOLLM2_135M | ({"num_hidden_layers": args.layers} if args.layers else {})
        model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation=attention))
    else:
        model, _ = load_backbone(args.model)
        model.set_attn_implementation(attention)
    return model.to(args.device, dtype).eval().requires_grad_(False)


# ---------------------------------------------------------------- measuring


def fitting(lengths: Sequence[int], room: int) -> list[int]:
    """The lengths in order, those beyond `room` cut to it."""
    return sorted({min(length, room) for length in lengths})


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """What was allocated at most beyond what there was, in GiB: of the GPU, or of this process (sampled)."""
    gc.collect()
    result = {"gib": float("nan")}
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result["gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
        return
    process, over = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        over.set()
        thread.join()
        result["gib"] = (peak - before) / 2**30


@dataclass(frozen=True)
class Cost:
    """What a call costs."""

    milliseconds: float
    """The median of the calls after the first ones."""
    first_milliseconds: float
    """The first call, with whatever is compiled or captured in it."""
    peak_gib: float
    """Beyond what was allocated before the first call, over all calls."""


def measure(function: Callable[[], Any], device: str, repeats: int = 5, warm_up: int = 2) -> Cost:
    """Call `function` `warm_up` + `repeats` times."""
    times = []
    with peak_memory(device) as peak:
        for _ in range(warm_up + repeats):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
    return Cost(statistics.median(times[warm_up:]), times[0], peak["gib"])


def attempt(function: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The values, or what went wrong: the other rows are still worth knowing."""
    try:
        return dict(function())
    except (torch.cuda.OutOfMemoryError, MemoryError):
        return {"error": "out of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[-200:]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """The rate of a large matrix product through PyTorch, in 10^12 floating-point operations a second."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / measure(lambda: a @ b, device, repeats=10, warm_up=3).milliseconds


def write_flops(model: PreTrainedModel, tokens: int, length: int, steps: int, last_loss: bool = True) -> float:
    """Floating-point operations of WRITE: `steps` forward and backward passes without weight gradients.

    One more forward pass finds the loss after the last step.

    A matrix product of n parameters takes 2n operations a token forward, and as many backward (for activations alone).
    Causal attention over N tokens takes 2 N d a token and layer forward, 2.5 times that backward.
    """
    config = model.config.get_text_config()
    table = model.get_input_embeddings().weight
    products = sum(p.numel() for p in model.parameters() if p.dim() == 2) - (
        0 if config.tie_word_embeddings else table.numel()
    )
    attention = 2 * length * config.hidden_size * config.num_hidden_layers
    forward = tokens * (2 * products + attention)
    backward = tokens * (2 * products + 2.5 * attention)
    return steps * (forward + backward) + (forward if last_loss else 0)


# ---------------------------------------------------------------- reports


def environment(device: str) -> dict[str, str]:
    """Hardware, versions and commit."""
    cuda = torch.device(device).type == "cuda"
    names = ("transformers", "peft", "gradmem-adapter")
    commit = os.environ.get("GRADMEM_COMMIT") or _output("git", "rev-parse", "--short", "HEAD")
    return {
        "hardware": torch.cuda.get_device_name(device)
        if cuda
        else f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **{name: _version(name) for name in names},
        "commit": commit + ("+" if _output("git", "status", "--porcelain") else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, which may get new columns by them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = [*read(path), *rows]
    columns = list(dict.fromkeys(name for row in everything for name in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in everything)
    temporary.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(_short(row.get(name, ""))) for name in columns) + " |", flush=True)
