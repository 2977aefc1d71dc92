"""Tests on a few tokens whether GradMem works with a backbone, when an adapter is attached."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.read.generation import generate_with_memory
from gradmem_adapter.utils.backbone import device_of, fresh, trunk, trunk_name
from gradmem_adapter.utils.trial import distance, sample_tokens, tolerance, trial_of

SKIP = "GradMemConfig(probe_backbone=False) attaches the adapter without this test."


_right: set[tuple[Any, ...]] = set()
"""The kinds of backbone that passed. The result depends on class and configuration, not on weights."""


def probe(backbone: PreTrainedModel) -> None:
    """Raise unless a backbone is causal, accepts embeddings instead of tokens in WRITE, READ and `generate`, and passes
    gradients to them. Runs four forward passes and a backward pass over a few tokens, without changing the model. A
    class and configuration is tested only once.

    Raises:
        TypeError: GradMem would give wrong results with it, or fail later.
    """
    config = backbone.config
    kind = type(backbone), device_of(backbone), backbone.dtype, config._attn_implementation, config.to_json_string()
    if kind in _right:
        return
    loaded = (module for module in backbone.modules() if not has_offloaded_params(module))
    if any(parameter.is_meta for module in loaded for parameter in module.parameters(recurse=False)):
        _step_aside(backbone, "some of its weights are on the meta device")
        return
    with trial_of(backbone) as copied, device_of(backbone):  # independent of the default device
        backbone = fresh(copied)
        ids = sample_tokens(backbone, rows=2)
        half = ids.shape[1] // 2
        ids[1, :half] = ids[0, :half]
        try:
            with torch.no_grad():
                expected = backbone(input_ids=ids, use_cache=False, return_dict=True).logits
        except Exception as error:
            found = f"its own forward pass over token ids failed ({_name(error)})"
            if isinstance(error, TypeError | ValueError) and "Triton" not in str(error):
                raise _refusal(backbone, found, "GradMem runs it on token ids only.") from error
            _step_aside(backbone, found)  # for example kernels for a device that it is not on yet
            return
        _check_causal(backbone, expected, half)
        _check_write(backbone, ids[:1], expected[:1])
        _check_generate(backbone, ids[:1], expected[:1])
    _right.add(kind)


def _step_aside(backbone: PreTrainedModel, reason: str) -> None:
    warnings.warn(
        f"{type(backbone).__name__} could not be tested when the adapter was attached: {reason}. Whether it is causal "
        "and accepts embeddings is unknown.",
        stacklevel=8,
    )


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _refusal(backbone: PreTrainedModel, found: str, needed: str) -> TypeError:
    return TypeError(
        f"{type(backbone).__name__}: {found}. {needed} Use another backbone, or a text-only causal class of this one. "
        f"{SKIP}"
    )


def _check_causal(backbone: PreTrainedModel, logits: Tensor, half: int) -> None:
    """The second half of the tokens differs between the two rows and must not affect the logits of the first half."""
    if not logits.isfinite().all():
        raise _refusal(
            backbone,
            f"its logits are not finite in {backbone.dtype}",
            "Load it in the dtype that it was trained in (dtype='auto'), or in float32.",
        )
    leak = distance(logits[1:, :half], logits[:1, :half])
    if leak > tolerance(backbone) / 4:  # rows of one batch have the same rounding
        raise _refusal(
            backbone,
            f"logits change by {leak:.1%} when later tokens do",
            "GradMem needs a causal language model: the write loss is meaningless if the model sees the tokens that it "
            "predicts.",
        )


def _check_write(backbone: PreTrainedModel, ids: Tensor, expected: Tensor) -> None:
    """Trunk and head, run on token embeddings as in WRITE, must give the same logits as token ids, and a gradient. They
    must also accept a vector that belongs to no token, like memory (Gemma 4 looks up tokens by their embeddings)."""
    try:
        with torch.enable_grad():
            tokens = backbone.get_input_embeddings()(ids).detach()
            mixed = torch.cat([tokens.mean(1, keepdim=True), tokens[:, 1:]], dim=1)
            embeddings = torch.cat([tokens, mixed]).requires_grad_()
            inputs = {"inputs_embeds": embeddings.clone(), "use_cache": False, "return_dict": True}
            logits = output_head(backbone)(trunk(backbone)(**inputs).last_hidden_state)
    except Exception as error:
        raise _refusal(
            backbone,
            f"{trunk_name(backbone)!r} and the output head failed on inputs_embeds alone ({_name(error)})",
            "WRITE runs these two on memory, which is input embeddings without tokens.",
        ) from error
    if (apart := distance(logits[:1], expected)) > tolerance(backbone):
        with torch.no_grad():
            whole = backbone(inputs_embeds=tokens.clone(), use_cache=False, return_dict=True).logits
        if (outside := distance(whole, expected)) > tolerance(backbone):
            raise _refusal(
                backbone,
                f"logits from inputs_embeds differ by {outside:.0%} from those of the same tokens as input_ids",
                "Memory is input embeddings without tokens, so a model that also uses token ids cannot read it.",
            )
        raise _refusal(
            backbone,
            f"{trunk_name(backbone)!r} and the output head give logits that differ by {apart:.0%} from the model's own",
            "WRITE runs only these two.",
        )
    with torch.enable_grad():
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].expand(2, -1).flatten())
    try:
        (gradient,) = torch.autograd.grad(loss, embeddings)
    except Exception as error:
        raise _refusal(
            backbone,
            f"a backward pass to its input embeddings failed ({_name(error)})",
            "WRITE takes gradient steps on input embeddings.",
        ) from error
    if not (gradient.isfinite().all() and gradient[:, :-1].abs().sum(-1).gt(0).all()):
        raise _refusal(
            backbone,
            "the gradient of a loss with respect to its input embeddings is zero or not finite",
            "WRITE takes gradient steps on input embeddings.",
        )


class _Forced(LogitsProcessor):
    """Forces `generate` to choose the given tokens `[B, steps]`, in order."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = list(tokens.unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.tokens.pop(0)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _check_generate(backbone: PreTrainedModel, ids: Tensor, expected: Tensor) -> None:
    """Decoding after embeddings must give the logits of a forward pass over all tokens; two tokens are forced.

    The model's own generation_config holds the user's choices and must not affect the test, so the copy gets another
    one.
    """
    backbone.generation_config = GenerationConfig(pad_token_id=0, use_cache=backbone.generation_config.use_cache)
    start, steps = 2, 2
    prompt = ids.shape[1] - steps
    try:
        with torch.no_grad():
            prefix = backbone.get_input_embeddings()(ids[:, :start])
            output = generate_with_memory(
                backbone, ids[:, start:prompt], prefix, attention_mask=torch.ones_like(ids[:, start:prompt]),
                max_new_tokens=steps, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True,
                logits_processor=LogitsProcessorList([_Forced(ids[:, prompt:])]),
            )  # fmt: skip
    except Exception as error:
        raise _refusal(
            backbone,
            f"generate() after input embeddings failed ({_name(error)})",
            "READ needs a generate() that takes inputs_embeds.",
        ) from error
    apart = distance(torch.stack(output.logits, dim=1), expected[:, prompt - 1 : -1])
    if apart > tolerance(backbone):
        raise _refusal(
            backbone,
            f"generate() from inputs_embeds gives logits that differ by {apart:.0%} from those of the forward pass",
            "READ decodes after memory, which is input embeddings.",
        )
