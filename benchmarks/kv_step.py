"""Training steps per second on key-value retrieval: strategies, compiled layers, CUDA graphs.

python -m benchmarks.kv_step [--pairs 16] [--contexts 512] [--queries 8] [--write-steps 1]
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.training import HOW, cost_of_a_step
from evaluation.key_values import pairs_tokenizer, sample_pairs
from evaluation.models import scratch_llama
from gradmem_adapter import GradMemConfig
from gradmem_adapter.peft_model import get_peft_model


def measure(args: argparse.Namespace, meta_gradient: str, how: str, bf16: bool) -> dict[str, Any]:
    """What a step of one variant costs, on a batch that stays the same."""
    config = GradMemConfig(
        num_memory_tokens=8, write_steps=args.write_steps, learn_write_lr="scalar", write_head=True,
        reconstruction_weight=0.25, meta_gradient=meta_gradient, train_backbone=True,
    )  # fmt: skip
    model = get_peft_model(scratch_llama(pairs_tokenizer()), config).to(args.device).eval()
    batch = sample_pairs(args.contexts, args.queries, args.pairs, device=args.device)

    def loss() -> Tensor:
        return model(**batch).loss

    torch.set_float32_matmul_precision("high")  # TF32
    try:
        cost = cost_of_a_step(loss, model, how, bf16, args)
    finally:
        torch.set_float32_matmul_precision("highest")
    return {"steps_per_second": 1000 / cost.milliseconds, **vars(cost)}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "kv_step")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--contexts", type=int, default=512)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--write-steps", type=int, default=1)
    parser.add_argument("--meta-gradients", nargs="*", default=["finite_difference", "exact"])
    parser.add_argument("--how", nargs="*", choices=HOW, default=HOW if torch.cuda.is_available() else HOW[:2])
    parser.add_argument("--bf16", action="store_true", help="also under autocast")
    args = parser.parse_args(argv)
    for name, how, bf16 in itertools.product(args.meta_gradients, args.how, (False, True) if args.bf16 else (False,)):
        if name == "exact" and how != "eager":
            continue  # compiled layers have no double backward
        common.record(
            args, "kv_step", name, partial(measure, args, name, how, bf16), memory_tokens=8,
            write_steps=args.write_steps, compiled=how != "eager", graph=how == "graph", bf16=bf16, pairs=args.pairs,
            contexts=args.contexts, queries=args.queries,
        )  # fmt: skip


if __name__ == "__main__":
    main()
