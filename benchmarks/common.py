"""Shared by all benchmarks: models, tokens, measuring, and records of measurements."""

from __future__ import annotations

import argparse
import functools
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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.shapes import DEFAULT, SHAPES
from evaluation.results import RESULTS, Record, add_records
from gradmem_adapter import GradMemConfig, load_backbone
from gradmem_adapter.peft_model import GradMemPeftModel, get_peft_model

SMOLLM2_135M = SHAPES["smollm2-135m"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """An argument parser with the options of every benchmark."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    result.add_argument("--device", type=with_index, default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    result.add_argument(
        "--model",
        default="random",
        help="a name on the hub, a directory or package:<package>/<file>.gguf; 'random': a shape with random weights "
        "(time and memory do not depend on the weights)",
    )
    result.add_argument("--shape", choices=SHAPES, default=DEFAULT, help="the shape of a random model")
    result.add_argument("--layers", type=int, help="layers of a random model, to try a benchmark out")
    result.add_argument("--results", type=Path, default=RESULTS, help="the folder of the result files")
    result.add_argument("--repeats", type=int, default=5, help="timed calls")
    return result


def backbone(args: argparse.Namespace, attention: str = "sdpa") -> PreTrainedModel:
    """The frozen model that `--model`, `--dtype` and `--device` ask for."""
    dtype = DTYPES[args.dtype]
    if args.model == "random":
        torch.manual_seed(0)
        fields = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
        with torch.device(args.device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype)
    else:
        model, _ = load_backbone(args.model)
    model.set_attn_implementation(attention)
    cast(torch.nn.Module, model).to(args.device, dtype)
    return model.eval().requires_grad_(False)


def adapter(args: argparse.Namespace, **options: Any) -> tuple[GradMemPeftModel, PreTrainedModel]:
    """The model of `backbone` with an adapter of `--memory` vectors, and the backbone in it."""
    model = backbone(args)
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=args.memory, **options)
    return get_peft_model(model, config).eval(), model


def random_tokens(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same in every run: time and memory do not depend on them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def fitting(lengths: Sequence[int], room: int) -> list[int]:
    """The lengths, limited to `room` and without duplicates."""
    return list(dict.fromkeys(min(length, room) for length in lengths))


# ---------------------------------------------------------------- measuring


def with_index(device: str) -> str:
    """The full name of a device: "cuda:0" for "cuda". Not all functions of `torch.cuda` take a name without index."""
    return str(torch.empty(0, device=device).device)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """The peak memory beyond that at the beginning, in GiB: of the GPU, or of this process (sampled)."""
    gc.collect()
    result = {"peak_gib": float("nan")}
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result["peak_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
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
        result["peak_gib"] = (peak - before) / 2**30


@dataclass(frozen=True)
class Cost:
    """The cost of a call.

    Args:
        milliseconds (`float`): the median of the calls after the first ones.
        first_milliseconds (`float`): the first call, including compilation and capture.
        peak_gib (`float`): memory beyond what was allocated before the first call, over all calls.
    """

    milliseconds: float
    first_milliseconds: float
    peak_gib: float


def measure(function: Callable[[], Any], device: str, repeats: int = 5, warm_up: int = 2) -> Cost:
    """Call a function `warm_up` + `repeats` times."""
    times = []
    with peak_memory(device) as peak:
        for _ in range(warm_up + repeats):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
    return Cost(statistics.median(times[warm_up:]), times[0], **peak)


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """The rate of a large matrix product in PyTorch, in 10^12 floating-point operations per second."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / measure(lambda: a @ b, device, repeats=10, warm_up=3).milliseconds


# ---------------------------------------------------------------- records


def record(
    args: argparse.Namespace,
    task: str,
    method: str,
    function: Callable[[], Cost | Mapping[str, float | None]],
    *,
    memory_tokens: int | None = None,
    write_steps: int | None = None,
    **settings: Any,
) -> Record:
    """Measure, print, and append to `<results>/<task>.jsonl` at once, so that a stopped benchmark loses nothing.

    Args:
        args (`Namespace`): the options of `parser`.
        task (`str`): what is measured; also the name of the file.
        method (`str`): the method that is measured.
        function (`Callable`): measures. Its errors are recorded and do not stop the benchmark.
        memory_tokens, write_steps, settings: what distinguishes this measurement from others.
    """
    metrics: dict[str, float | None] = {}
    facts = versions()
    try:
        found = function()
        metrics = asdict(found) if isinstance(found, Cost) else dict(found)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        facts["error"] = "out of memory"
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {str(error)[-200:]}"
    if "error" in facts:  # only now: until here, the traceback keeps tensors alive
        gc.collect()
        torch.cuda.empty_cache()
    result = Record(
        task=task, method=method, memory_tokens=memory_tokens, write_steps=write_steps,
        settings=environment(args) | settings, metrics=metrics, facts=facts,
    )  # fmt: skip
    add_records(args.results / f"{task}.jsonl", [result])
    shown = settings | {"K": write_steps} | {name: _short(value) for name, value in metrics.items()}
    print(f"{task}, {method}:", ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None), flush=True)
    if "error" in facts:
        print(f"    {facts['error']}", flush=True)
    return result


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What distinguishes runs: hardware, model, dtype, commit and date."""
    cuda = torch.device(args.device).type == "cuda"
    commit = os.environ.get("GRADMEM_COMMIT") or _output("git", "rev-parse", "--short", "HEAD")
    return {
        "hardware": torch.cuda.get_device_name(args.device) if cuda else _processor(),
        "model": args.model,
        "dtype": args.dtype,
        "commit": commit + ("+" if _output("git", "status", "--porcelain") else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    } | {
        name: value for name, value in (("layers", args.layers), ("shape", args.shape)) if value not in (None, DEFAULT)
    }


def versions() -> dict[str, Any]:
    """Versions of the libraries that affect time and memory."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
