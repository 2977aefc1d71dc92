"""One pullback through a write step by every way there is, on the key-value model (short contexts).

    python -m benchmarks.forward_over_reverse [--pairs 16] [--contexts 512]

Forward over reverse is `torch.func.jvp` of `torch.func.grad` (MixFlow-MG, arXiv 2505.00793), plain and compiled; it
needs attention that has a forward derivative, so plain matrix products. One JSON object per line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradmem_adapter.ops.attention import TwiceDifferentiableAttention, plain_attention
from gradmem_adapter.tasks.kv_retrieval import KVRetrieval, kv_backbone
from gradmem_adapter.training.speed import compiled_layers, fast_matmul, maskless_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = "gradmem_plain"


def plain(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return plain_attention(q, k, v, is_causal=True, scale=kwargs.get("scaling")).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PLAIN, plain)


class WriteLoss(nn.Module):
    """The summed write loss as a function of the memory [B, m, d]."""

    def __init__(self, backbone: PreTrainedModel, tokens: Tensor) -> None:
        super().__init__()
        self.backbone, self.tokens = backbone, tokens

    def forward(self, memory: Tensor) -> Tensor:
        embeddings = self.backbone.get_input_embeddings()(self.tokens)
        hidden = self.backbone.base_model(
            inputs_embeds=torch.cat([memory, embeddings], dim=1), use_cache=False
        ).last_hidden_state
        logits = self.backbone.lm_head(hidden[:, memory.shape[1] - 1 : -1])
        return F.cross_entropy(logits.flatten(0, 1), self.tokens.flatten(), reduction="sum") / self.tokens.shape[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--contexts", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    backbone = kv_backbone().to(DEVICE)
    tokens = KVRetrieval(args.pairs).sample(args.contexts, 1, DEVICE).context_input_ids
    loss = WriteLoss(backbone, tokens)
    weights = dict(loss.named_parameters())
    memory = torch.randn(args.contexts, 8, backbone.config.hidden_size, device=DEVICE) * 0.02
    v = torch.randn_like(memory)
    t = 0.01 * (memory.norm(dim=2) / v.norm(dim=2)).amin()

    def first_order(at: Tensor) -> list[Tensor]:
        leaf = at.detach().requires_grad_()
        return list(torch.autograd.grad(loss(leaf), [leaf, *weights.values()]))

    def reverse_over_reverse() -> list[Tensor]:
        leaf = memory.detach().requires_grad_()
        with TwiceDifferentiableAttention():
            (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            found = torch.autograd.grad(g, [leaf, *weights.values()], v, allow_unused=True)
        return [torch.zeros_like(p) if x is None else x for x, p in zip(found, [leaf, *weights.values()], strict=True)]

    def finite_difference() -> list[Tensor]:
        sides = zip(first_order(memory + t * v), first_order(memory - t * v), strict=True)
        return [(a - b) / (2 * t) for a, b in sides]

    def gradients(at: Tensor, params: dict[str, Tensor]) -> Any:
        return grad(lambda m, p: functional_call(loss, p, (m,)), argnums=(0, 1))(at, params)

    def forward_over_reverse() -> list[Tensor]:
        detached = {name: p.detach() for name, p in weights.items()}
        _, (first, rest) = jvp(lambda at: gradients(at, detached), (memory,), (v,))
        return [first, *rest.values()]

    def measure(name: str, run: Callable[[], list[Tensor]], reference: list[Tensor] | None) -> list[Tensor]:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = run()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        ready = time.perf_counter()
        for _ in range(args.repeats):
            run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        flat = torch.cat([x.detach().flatten() for x in found])
        result = {
            "pullback": name, "pairs": args.pairs, "contexts": args.contexts,
            "milliseconds": 1000 * (time.perf_counter() - ready) / args.repeats, "first_seconds": ready - start,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None,
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        }  # fmt: skip
        if reference is not None:
            expected = torch.cat([x.detach().flatten() for x in reference])
            result["cosine"] = F.cosine_similarity(flat, expected, dim=0).item()
        print(json.dumps(result), flush=True)
        return found

    def attempt(name: str, run: Callable[[], list[Tensor]]) -> None:
        try:
            measure(name, run, exact)
        except Exception as error:  # what does not work is a result, too
            print(json.dumps({"pullback": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True)

    with fast_matmul(), maskless_attention(backbone):
        exact = measure("reverse over reverse", reverse_over_reverse, None)
        attempt("finite difference", finite_difference)
        with compiled_layers(backbone, True):
            attempt("finite difference, compiled", finite_difference)
        backbone.config._attn_implementation = PLAIN
        attempt("forward over reverse", forward_over_reverse)
        attempt("forward over reverse, compiled", torch.compile(forward_over_reverse))


if __name__ == "__main__":
    main()
