"""Whether the finite difference's step biases the meta-gradient of key-value retrieval with a trained checkpoint.

    python -m benchmarks.kv_meta_gradient --pairs 96 --write-steps 5

Single gradients tell little: near the end of training, gradients of different batches have little in common. Therefore
means over many batches are compared, and the contribution of noise to a squared length is subtracted. A bias as long as
the exact gradient would stop training at the point where the two cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from evaluation.key_values import sample_pairs
from gradmem_adapter import load_checkpoint


def length_of_mean(vectors: Sequence[Tensor]) -> float:
    """The length of the common mean of independent noisy vectors [P]; 0 if noise hides it."""
    n = len(vectors)
    single = sum(float(v.square().sum()) for v in vectors)
    together = float(torch.stack(list(vectors)).sum(0).square().sum())
    return max(0.0, (together - single) / (n * (n - 1))) ** 0.5


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "kv_meta_gradient")
    parser.add_argument("--checkpoint", default="checkpoints/kv-retrieval")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--write-steps", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=4, help="contexts per batch")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--relative-steps", type=float, nargs="*", default=[0.03, 0.01])
    args = parser.parse_args(argv)

    model, _ = load_checkpoint(args.checkpoint, is_trainable=True)
    config = model.active_peft_config
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients(meta_gradient: str, relative_step: float | None = None) -> list[Tensor]:
        config.meta_gradient, config.finite_difference_step = meta_gradient, relative_step
        found = []
        for seed in range(args.batches):
            batch = sample_pairs(args.contexts, args.pairs, args.pairs, generator=torch.Generator().manual_seed(seed))
            loss = model(**batch, write_steps=args.write_steps).loss
            parts = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([part.flatten() for part in parts]))
        return found

    exact = gradients("exact")

    def lengths() -> dict[str, float]:
        return {"length": sum(v.norm().item() for v in exact) / len(exact), "length_of_mean": length_of_mean(exact)}

    def against_exact(step: float) -> dict[str, float]:
        pairs = list(zip(gradients("finite_difference", step), exact, strict=True))
        return {
            "cosine": sum(F.cosine_similarity(a, b, dim=0).item() for a, b in pairs) / len(pairs),
            "bias": length_of_mean([a - b for a, b in pairs]),
        }

    shape = {"write_steps": args.write_steps, "pairs": args.pairs, "contexts": args.contexts, "batches": args.batches}
    common.record(args, "kv_meta_gradient", "exact", lengths, **shape)
    for step in args.relative_steps:
        common.record(
            args, "kv_meta_gradient", "finite_difference", partial(against_exact, step), relative_step=step, **shape
        )


if __name__ == "__main__":
    main()
