"""What a pass of WRITE keeps for its backward pass, how many bytes that are, and how to do with less."""

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
"""What the backward pass of a layer takes beyond what was saved for it, as a share of that; from 0.5 to 0.9 by the
architecture (tests/write/test_plan.py)."""
COMPILED_WORKSPACE = {"cuda": 1.0}
"""The same of a layer compiled by Inductor that is not computed again. Its backward pass is one operation, at whose end
alone what was saved is freed; what was computed again is freed as it is used."""
COMPILED = {"cuda": 0.7}
"""What layers compiled by Inductor keep, as a share of what they keep otherwise. An H200 had 0.68 at the shape of an 8B
Llama (evaluation/results/write_sizes.jsonl)."""
LOGIT_BYTES = 12
"""Of each logit that is held at once: its own, those of its probability in float32, and of both gradients."""
PROBED = {"cuda": 128, "cpu": 8}
"""So many tokens, twice and three times as many go through a model to see what it saves; some kernels of a GPU round
lengths up to such a number."""


class Plan(NamedTuple):
    """How a pass of WRITE goes through the model.

    Args:
        rows (`int`): contexts at a time.
        recomputed (`int`, *optional*, defaults to `0`): how many layers, from the first, keep their input alone for the
            backward pass, and compute the rest again in it.
        offloaded (`bool`, *optional*, defaults to `False`): these inputs wait on the CPU.
    """

    rows: int
    recomputed: int = 0
    offloaded: bool = False

    def of(self, writer: Writer) -> Writer:
        """The writer with a backbone that goes by the plan."""
        if not self.recomputed:
            return writer
        return replace(writer, backbone=recomputed(writer.backbone, self.recomputed, offloaded=self.offloaded))

    def __str__(self) -> str:
        said = [f"{counted(self.rows, 'context')} at a time"]
        if self.recomputed:
            said.append(f"{counted(self.recomputed, 'layer')} computed again in the backward pass")
        if self.offloaded:
            said.append("their inputs kept on the CPU")
        return ", ".join(said)


def plans(batch: int, length: int, layers: int, device: torch.device) -> list[Plan]:
    """The plans for a batch, each slower than the one before.

    Contexts are split as long as a part keeps the device busy, which costs nothing. Then one layer after the other is
    computed again, but for the last, then the contexts are split further, and at last what the layers that are computed
    again keep, a few or no layers less, goes to the CPU.

    Args:
        batch (`int`): how many contexts.
        length (`int`): tokens of the longest.
        layers (`int`): of the model; 0 where nothing can be computed again.
        device (`torch.device`): where it runs.
    """
    rows = [batch]
    while rows[-1] > 1:
        rows.append(-(-rows[-1] // 2))
    busy = SATURATED.get(device.type, SATURATED["cpu"])
    many = [n for n in rows if n == batch or n * length >= busy]
    result = [Plan(n) for n in many]
    result += [Plan(many[-1], again) for again in range(1, layers)]
    most = max(0, layers - 1)  # the last layer's gradients come first: to compute it again saves nothing
    result += [Plan(n, most) for n in rows[len(many) :]]
    if most and device.type != "cpu":
        result += [Plan(1, again, offloaded=True) for again in range(most - most // 8, most + 1)]
    return result


class Footprint(NamedTuple):
    """How many bytes a model takes for a pass of WRITE.

    Args:
        layers (`int`): of the model.
        fixed (`float`): bytes that it saves whatever the tokens are: weights that were brought to the device for it.
        token (`float`): bytes that all layers save of a token for the backward pass.
        pair (`float`): and of each pair of tokens, where attention weights are kept.
        inputs (`float`): bytes of one token in the input of one layer.
        vocabulary (`int`): logits of a token.
        device (`torch.device`): where it runs.
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
        """See what a model saves: by a few tokens, as each architecture and quantisation saves its own.

        Args:
            backbone (`PreTrainedModel`): the causal LM, in its type and with its adapters.
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
        """How many bytes a plan takes for contexts of `length` tokens each, beside the model, or its layers compiled.

        What layers keep is there with the logits at the loss; then one layer after the other is freed, and one that is
        computed again has what it saves while its gradients are found.
        """
        tokens = plan.rows * length
        share = COMPILED.get(self.device.type, 1.0) if compiled else 1.0
        workspace = COMPILED_WORKSPACE.get(self.device.type, WORKSPACE) if compiled else WORKSPACE
        layer = share * tokens * (self.token + self.pair * length) / max(1, self.layers)
        waiting = 0.0 if plan.offloaded else plan.recomputed * tokens * self.inputs
        kept = (max(1, self.layers) - plan.recomputed) * layer
        logits = LOGIT_BYTES * min(tokens * self.vocabulary, max_logits(self.device))
        ends = 4 * tokens * self.inputs  # embeddings, alone and behind the prefix, last hidden states, their gradient
        most = max(kept + logits + ends, kept + workspace * layer, (1 + WORKSPACE) * layer)
        return OVERHEAD.get(self.device.type, 1.0) * (self.fixed + waiting + most)


def saved_bytes(backbone: PreTrainedModel, length: int) -> int:
    """How many bytes a model saves for the backward pass to the embeddings of `length` tokens, weights not counted.

    They are counted and let go: this takes no more memory than a forward pass.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        length (`int`): tokens.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    there: set[int] = set()
    total = 0

    def count(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage._cdata not in there:
            there.add(storage._cdata)
            weakref.finalize(storage, there.discard, storage._cdata)  # the next one at this place is another
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
        embeddings = embeddings.detach().requires_grad_().clone()  # some models write into them
        trunk(fresh(backbone))(inputs_embeds=embeddings, use_cache=False)
    return total


def _embeddings(backbone: PreTrainedModel) -> Tensor:
    return cast(Tensor, backbone.get_input_embeddings().weight)
