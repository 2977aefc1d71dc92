"""How close the finite difference comes to the exact meta-gradient if the loss has kinks: routed experts, ReLU,
activations in 8 bits. The models are small and random, in float32, and all weights are trained.

    python -m benchmarks.kinks

Reports the cosine of the gradients over all weights with the exact one: the median and the lowest over seeds.
"""

from __future__ import annotations

import statistics
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import common
from gradmem_adapter import GradMemConfig
from gradmem_adapter.peft_model import get_peft_model

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED: dict[str, Any] = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "llama, 8-bit activations": GROUPED,
    "opt": SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mixtral": GROUPED | EXPERTS,
    "gpt_oss": GROUPED | EXPERTS | {"head_dim": 16},
    "deepseek_v3": SIZES | {
        "intermediate_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 32,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
    },
}  # fmt: skip
"""Configurations by name; the part before a comma is the model's type."""
WAYS: dict[str, dict[str, Any]] = {
    "first order": {"meta_gradient": "first_order"},
    "finite difference": {"meta_gradient": "finite_difference"},
    "finite difference, step 0.0005": {"meta_gradient": "finite_difference", "finite_difference_step": 5e-4},
    "finite difference, step 0.02": {"meta_gradient": "finite_difference", "finite_difference_step": 2e-2},
}


def backbone(name: str, scale: float, seed: int) -> PreTrainedModel:
    """A random model with weights scaled relative to Transformers' initialisation."""
    torch.manual_seed(seed)
    kind, _, rounded = name.partition(", ")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **BACKBONES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1)
    for module in model.modules():
        if rounded and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_rounded)
    return model.eval()


def _rounded(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Round inputs of a linear layer to 8 bits with a scale per token; gradients pass unchanged, as in LLM.int8."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (inputs[0] + ((inputs[0] / scale).round() * scale - inputs[0]).detach(),)


def cosines(name: str, scale: float, seed: int, device: str) -> dict[str, float]:
    """The cosine with the exact gradient for each of `WAYS`."""
    model = backbone(name, scale, seed).to(device)  # type: ignore[arg-type] # Transformers' own type of `to`
    config = GradMemConfig(num_memory_tokens=8, train_backbone=True, memory_init="vocab", write_lr=0.3)
    adapted = get_peft_model(model, config)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    context, query = torch.randint(256, (4, 32), device=device), torch.randint(256, (4, 8), device=device)

    def gradient(meta_gradient: str, finite_difference_step: float | None = None) -> Tensor:
        config.meta_gradient, config.finite_difference_step = meta_gradient, finite_difference_step
        loss = adapted(input_ids=query, labels=query, context_input_ids=context).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])

    exact = gradient("exact")
    return {way: F.cosine_similarity(gradient(**options), exact, dim=0).item() for way, options in WAYS.items()}


def over_seeds(values: list[float]) -> dict[str, float]:
    """The recorded statistics of a cosine."""
    return {"cosine_median": statistics.median(values), "cosine_lowest": min(values)}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "kinks")
    parser.set_defaults(dtype="float32")
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--scales", type=float, nargs="*", default=[1, 4], help="scales of the weights")
    parser.add_argument("--seeds", type=int, default=8, help="how many models of each kind")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="The loss of .* has kinks")
    for name in args.backbones:
        for scale in args.scales:
            found = [cosines(name, scale, seed, args.device) for seed in range(args.seeds)]
            for way in WAYS:
                common.record(
                    args, "meta_gradient_kinks", way, partial(over_seeds, [of_seed[way] for of_seed in found]),
                    memory_tokens=8, write_steps=2, backbone=name, weight_scale=scale, seeds=args.seeds,
                )  # fmt: skip


if __name__ == "__main__":
    main()
