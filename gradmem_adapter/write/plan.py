"""What a pass of WRITE keeps for its backward pass, how many bytes that takes, and how to use less."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from gradmem_adapter.lora import write_phase
from gradmem_adapter.ops.cross_entropy import max_logits
from gradmem_adapter.utils.backbone import decoder_layers, device_of, fresh, max_positions, trunk
from gradmem_adapter.utils.hardware import OVERHEAD, SATURATED
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.recompute import recomputed

WORKSPACE = 0.75
"""The memory that the backward pass of a layer takes in addition to its saved tensors, as a share of them; from 0.5 to
0.9 depending on the architecture (tests/write/test_plan.py)."""
COMPILED_WORKSPACE = {"cuda": 1.0}
"""The same for a layer that Inductor compiled and that is not recomputed. Its backward pass is one operation, which
frees the saved tensors only at its end; recomputed tensors are freed as they are used."""
COMPILED = {"cuda": 0.7}
"""What layers compiled by Inductor keep, as a share of what they keep uncompiled. An H200 had 0.68 at the shape of an
8B Llama (evaluation/results/write_sizes.jsonl)."""
LOGIT_BYTES = 12
"""Bytes per logit held at once: the logit, its probability in float32, and both gradients."""
PROBED = {"cuda": 128, "cpu": 8}
"""The number of tokens, also doubled and tripled, that a model runs on to measure what it saves. Some GPU kernels round
lengths up to such a number."""


class Plan(NamedTuple):
    """How a pass of WRITE goes through the model.

    Args:
        rows (`int`): contexts at a time.
        recomputed (`int`, *optional*, defaults to `0`): how many layers, from the first, keep only their input for the
            backward pass, which recomputes the rest.
        offloaded (`bool`, *optional*, defaults to `False`): keep these inputs on the CPU.
    """

    rows: int
    recomputed: int = 0
    offloaded: bool = False

    def of(self, writer: Writer) -> Writer:
        """The writer with a backbone that follows the plan."""
        if not self.recomputed:
            return writer
        return replace(writer, backbone=recomputed(writer.backbone, self.recomputed, offloaded=self.offloaded))

    def __str__(self) -> str:
        said = [f"{counted(self.rows, 'context')} at a time"]
        if self.recomputed:
            said.append(f"{counted(self.recomputed, 'layer')} recomputed in the backward pass")
        if self.offloaded:
            said.append("their inputs kept on the CPU")
        return ", ".join(said)


def plans(batch: int, length: int, layers: int, device: torch.device) -> list[Plan]:
    """The plans for a batch, from fast to slow.

    First, contexts are split as long as each part keeps the device busy, which costs nothing. Then more and more layers
    are recomputed, except for the last. Then the contexts are split further. Last, the inputs of recomputed layers are
    kept on the CPU, with all or slightly fewer layers recomputed.

    Args:
        batch (`int`): how many contexts.
        length (`int`): the tokens of the longest context.
        layers (`int`): the number of layers; 0 if none can be recomputed.
        device (`torch.device`): where the model runs.
    """
    rows = [batch]
    while rows[-1] > 1:
        rows.append(-(-rows[-1] // 2))
    busy = SATURATED.get(device.type, SATURATED["cpu"])
    many = [n for n in rows if n == batch or n * length >= busy]
    result = [Plan(n) for n in many]
    result += [Plan(many[-1], again) for again in range(1, layers)]
    most = max(0, layers - 1)  # the last layer's gradients come first, so recomputing it saves nothing
    result += [Plan(n, most) for n in rows[len(many) :]]
    if most and device.type != "cpu":
        result += [Plan(1, again, offloaded=True) for again in range(most - most // 8, most + 1)]
    return result


class Footprint(NamedTuple):
    """The memory that a model needs for a pass of WRITE.

    Args:
        layers (`int`): the number of layers.
        fixed (`float`): bytes that it saves whatever the number of tokens: weights that were moved to the device for
            the pass.
        token (`float`): bytes per token that all layers together save for the backward pass.
        pair (`float`): bytes per pair of tokens, if attention weights are kept.
        inputs (`float`): bytes of one token in the input of one layer.
        vocabulary (`int`): logits per token.
        device (`torch.device`): where the model runs.
    """

    layers: int
    fixed: float
    token: float
    pair: float
    inputs: float
    vocabulary: int
    device: torch.device

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Footprint:
        """Measure on a few tokens what a model saves, which differs by architecture and quantisation.

        Args:
            backbone (`PreTrainedModel`): the causal LM, in its dtype and with its adapters.
        """
        device = device_of(backbone)
        n = min(PROBED.get(device.type, PROBED["cpu"]), (max_positions(backbone) or 2**20) // 3)
        once, twice, thrice = (saved_bytes(backbone, n * times) for times in (1, 2, 3))
        pair = max(0.0, (thrice - 2 * twice + once) / (2 * n * n))  # of a + b n + c n^2 at n, 2n and 3n
        token = (twice - once) / n - 3 * n * pair
        config = backbone.config.get_text_config()
        width = getattr(config, "hidden_size", None) or _embeddings(backbone).shape[1]
        return cls(
            layers=len(decoder_layers(backbone)),
            fixed=once - n * token - n * n * pair,
            token=token,
            pair=pair,
            inputs=width * backbone.dtype.itemsize,
            vocabulary=len(_embeddings(backbone)),
            device=device,
        )

    def bytes(self, plan: Plan, length: int, compiled: bool = False) -> float:
        """How many bytes a plan takes for contexts of `length` tokens each, in addition to the model.

        At the loss, everything that layers keep exists together with the logits. Then layers are freed one by one; a
        recomputed layer holds what it saves while its gradients are computed.
        """
        tokens = plan.rows * length
        share = COMPILED.get(self.device.type, 1.0) if compiled else 1.0
        workspace = COMPILED_WORKSPACE.get(self.device.type, WORKSPACE) if compiled else WORKSPACE
        layer = share * tokens * (self.token + self.pair * length) / max(1, self.layers)
        waiting = 0.0 if plan.offloaded else plan.recomputed * tokens * self.inputs
        kept = (max(1, self.layers) - plan.recomputed) * layer
        logits = LOGIT_BYTES * min(tokens * self.vocabulary, max_logits(self.device))
        ends = 4 * tokens * self.inputs  # embeddings without and with the prefix, last hidden states, their gradient
        most = max(kept + logits + ends, kept + workspace * layer, (1 + WORKSPACE) * layer)
        return OVERHEAD.get(self.device.type, 1.0) * (self.fixed + waiting + most)


def saved_bytes(backbone: PreTrainedModel, length: int) -> int:
    """How many bytes a model saves for the backward pass to the embeddings of `length` tokens, without weights.

    Saved tensors are counted but not kept, so this takes no more memory than a forward pass."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    there: set[int] = set()
    total = 0

    def count(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage._cdata not in there:
            there.add(storage._cdata)
            weakref.finalize(storage, there.discard, storage._cdata)  # its address may be reused by another storage
            total += storage.nbytes()

    device = device_of(backbone)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        write_phase(),
        saved_tensors_hooks(count, lambda nothing: nothing),
    ):
        embeddings = backbone.get_input_embeddings()(torch.zeros(1, length, dtype=torch.long, device=device))
        embeddings = embeddings.detach().requires_grad_().clone()  # some models modify them in place
        trunk(fresh(backbone))(inputs_embeds=embeddings, use_cache=False)
    return total


def _embeddings(backbone: PreTrainedModel) -> Tensor:
    return cast(Tensor, backbone.get_input_embeddings().weight)
