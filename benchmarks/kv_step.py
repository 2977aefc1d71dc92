"""Training steps per second on key-value retrieval: strategies, compiled layers, CUDA graphs.

python -m benchmarks.kv_step [--pairs 16] [--contexts 512] [--queries 8] [--write-steps 1] [--steps 30]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import torch

from gradmem_adapter.tasks.kv_recipe import KVMix, KVRecipe, KVStage
from gradmem_adapter.tasks.kv_retrieval import KVRetrieval
from gradmem_adapter.training.graphed_step import GraphedStep
from gradmem_adapter.training.speed import compiled_layers, fast_matmul, maskless_attention


def measure(
    meta_gradient: str, compiled: bool, graphed: bool, bf16: bool, args: argparse.Namespace
) -> dict[str, object]:
    """Steps per second and peak memory of one variant, after the steps that compile and capture."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    recipe = KVRecipe(
        stages=(KVStage(1, (KVMix(args.pairs, args.contexts, args.queries),)),),
        memory={
            "num_memory_tokens": 8, "learn_write_lr": "scalar", "write_head": True, "reconstruction_weight": 0.25,
            "meta_gradient": meta_gradient,
        },
    )  # fmt: skip
    model = recipe.build().cuda().eval()
    task = KVRetrieval(args.pairs)

    def loss(kind: int) -> dict[str, torch.Tensor]:
        batch = task.sample(args.contexts, args.queries, "cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return {"loss": model(**batch.as_dict(), write_steps=kind).loss}

    step = GraphedStep(loss, [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.98))
    step.graphed = graphed
    with fast_matmul(), maskless_attention(model), compiled_layers(model, compiled):
        started = time.perf_counter()
        for _ in range(3):
            step(args.write_steps, 1e-4)
        torch.cuda.synchronize()
        ready = time.perf_counter()
        for _ in range(args.steps):
            step(args.write_steps, 1e-4)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - ready) / args.steps
    return {
        "meta_gradient": meta_gradient, "compiled": compiled, "graph": graphed, "bf16": bf16, "pairs": args.pairs,
        "contexts": args.contexts, "queries": args.queries, "write_steps": args.write_steps,
        "steps_per_second": round(1 / seconds, 2), "preparation_seconds": round(ready - started, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "gpu": torch.cuda.get_device_name(),
        "loss": step.means()[args.write_steps]["loss"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--contexts", type=int, default=512)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--write-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--meta-gradients", nargs="*", default=["finite_difference", "exact"])
    parser.add_argument("--bf16", action="store_true", help="also under autocast")
    args = parser.parse_args(argv)
    for name, graphed, compiled, bf16 in itertools.product(
        args.meta_gradients, (True, False), (True, False), (False, True) if args.bf16 else (False,)
    ):
        if name == "exact" and compiled:
            continue  # compiled layers have no double backward
        try:
            print(json.dumps(measure(name, compiled, graphed, bf16, args)), flush=True)
        except Exception as error:  # the others are still worth knowing
            print(json.dumps({"variant": [name, compiled, graphed, bf16], "error": str(error)[-500:]}), flush=True)


if __name__ == "__main__":
    main()
