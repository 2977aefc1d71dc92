"""Whether the finite difference's step biases the meta-gradient of key-value retrieval with a trained checkpoint.

    python -m benchmarks.kv_meta_gradient --pairs 96 --steps 5

Single gradients hardly tell: near the end of training those of different batches have little in common. So the means
over many batches are compared, and what their noise adds to a squared length is taken off. A bias as long as the exact
gradient stops training where the one cancels the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.tasks.kv_retrieval import KVRetrieval


def length_of_mean(vectors: Sequence[Tensor]) -> float:
    """The length of what independent vectors [P] are the mean of, plus noise; 0 where noise hides it."""
    n = len(vectors)
    single = sum(float(v.square().sum()) for v in vectors)
    together = float(torch.stack(list(vectors)).sum(0).square().sum())
    return max(0.0, (together - single) / (n * (n - 1))) ** 0.5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/kv-retrieval"))
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--steps", type=int, default=5, help="write steps")
    parser.add_argument("--contexts", type=int, default=4, help="of a batch")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--relative-steps", type=float, nargs="*", default=[0.03, 0.01])
    args = parser.parse_args(argv)

    model, _ = load_checkpoint(args.checkpoint, is_trainable=True)
    config = model.active_peft_config
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def gradient(seed: int, meta_gradient: str, relative_step: float | None = None) -> Tensor:
        config.meta_gradient, config.finite_difference_step = meta_gradient, relative_step
        task = KVRetrieval(args.pairs)
        batch = task.sample(args.contexts, args.pairs, torch.device("cpu"), seed)
        loss = model(**batch.as_dict(), write_steps=args.steps).loss
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    exact = [gradient(seed, "exact") for seed in range(args.batches)]
    one = sum(v.norm().item() for v in exact) / len(exact)
    print(f"the exact gradient: of one batch {one:.3f}, of all {length_of_mean(exact):.3f}", flush=True)
    for step in args.relative_steps:
        found = [gradient(seed, "finite_difference", step) for seed in range(args.batches)]
        pairs = list(zip(found, exact, strict=True))
        cosine = sum(F.cosine_similarity(a, b, dim=0).item() for a, b in pairs) / len(pairs)
        print(
            f"step {step}: cosine with it {cosine:.4f}, bias of all {length_of_mean([a - b for a, b in pairs]):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
