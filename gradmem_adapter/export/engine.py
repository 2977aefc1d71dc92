"""The base class of readers that use an engine: it checks prompts before sending them, and returns tokens as
Transformers does."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from gradmem_adapter.export.prompt_embeds import check_sendable
from gradmem_adapter.ops.answers import states_of_answers
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.ops.padding import move_padding_left
from gradmem_adapter.peft_model import GradMemPeftModel
from gradmem_adapter.read.generation import check_prompt, end_with_positions, generation_option, query_mask
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.backbone import check_length

_KNOWN = {
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id"),
    *("stop_strings", "tokenizer", "streamer", "stopping_criteria", "generation_config"),
}
_NONE_SAYS_SO = ("temperature", "top_k", "top_p", "eos_token_id")
"""Options for which an explicit None has a meaning: no such filter, no such end."""
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
_OF_CONFIGS = {"bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config", "use_cache"}

_RIGHT_MODEL = (
    "Serve the model that gradmem export made from this checkpoint; if the server has several models, pass its name."
)
_COMPARED_TOKENS = 8
_ROUNDING = 1.0
"""How many nats less likely, for this model, an engine's greedy token may be than this model's own. The right model in
bfloat16 was off by at most 0.01, wrong models by at least 10 within eight tokens (docs/lab/LOG.md)."""


_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_making = threading.Lock()


def lock_of(engine: Any) -> threading.Lock:
    """The lock for an engine in this process, shared by all its readers: only one thread may use it at a time.

    Args:
        engine: the engine.
    """
    with _making:
        return _locks.setdefault(engine, threading.Lock())


class EnginePrompt(NamedTuple):
    """What an engine reads for one prompt.

    Args:
        prefix (`Tensor`): `[P, d]`, the memory with its control vectors.
        tokens (`list[int]`): the tokens of the prompt that follows it.
    """

    prefix: Tensor
    tokens: list[int]


class EngineSampling(NamedTuple):
    """How an engine samples tokens.

    Args:
        max_new_tokens (`int`): the most tokens in an answer.
        stop_token_ids (`list[int]`): each of them ends an answer, as its last token.
        temperature (`float`): 0: greedy.
        top_k (`int`): 0: all tokens.
        top_p (`float`): 1: all tokens.
    """

    max_new_tokens: int
    stop_token_ids: list[int]
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, options: dict[str, Any], default: GenerationConfig) -> EngineSampling:
        """What Transformers' `generate` would do with the same options; `ValueError` if no length is given."""
        asked = {name: generation_option(name, options, default) for name in _KNOWN}
        if asked["max_new_tokens"] is None:
            raise ValueError("Pass max_new_tokens, the most tokens in an answer.")
        chosen = asked | {name: options[name] for name in _NONE_SAYS_SO if name in options}
        for name, value in default._get_default_generation_params().items():  # as `generate` itself fills them
            if asked.get(name, value) is None and name not in options:
                chosen[name] = value
        ends = [] if chosen["eos_token_id"] is None else chosen["eos_token_id"]
        sample = bool(chosen["do_sample"])
        temperature = 1.0 if chosen["temperature"] is None else float(chosen["temperature"])
        return cls(
            max_new_tokens=chosen["max_new_tokens"],
            stop_token_ids=list(ends) if isinstance(ends, list | tuple) else [int(ends)],
            temperature=temperature if sample else 0.0,
            top_k=(chosen["top_k"] or 0) if sample else 0,
            top_p=1.0 if chosen["top_p"] is None or not sample else float(chosen["top_p"]),
        )


class EngineReader(ABC):
    """Answers from memory with an engine that serves the export (`export_model`) of the model's checkpoint.

    Args:
        model (`PeftModel`): the model with the adapter that writes the states. States of another model are refused
            before anything is sent.
        check_model (`bool`, *optional*, defaults to `True`): before the first answer, ask for eight tokens and check
            that they are the model's own up to rounding: an engine with another model would answer as well.
    """

    def __init__(self, model: PeftModel | GradMemPeftModel, *, check_model: bool = True) -> None:
        self.model = cast(GradMemPeftModel, model)
        self._check_model = check_model
        self._to_compare = _COMPARED_TOKENS if check_model else 0
        self._comparing = threading.Lock()

    @abstractmethod
    def _answers(
        self, prompts: Sequence[EnginePrompt], sampling: EngineSampling
    ) -> Generator[tuple[int, list[int], bool], None, None]:
        """Ask the engine.

        Yields:
            The number of a prompt, new tokens of its answer, and whether they are the last.
        """

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        memory: MemoryState,
        context_index: Tensor | None = None,
        strict: bool = True,
        **options: Any,
    ) -> Tensor:
        """Answer prompts from memory, as `model.generate` does.

        Args:
            input_ids (`Tensor`): `[B, T]` prompts.
            attention_mask (`Tensor`, *optional*): `[B, T]`, padding on either side.
            memory (`MemoryState`): one state for all prompts or one per prompt.
            context_index (`Tensor`, *optional*): `[B]`, the index of each prompt's state, or `[B, S]`, of those it
                reads side by side.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            options: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `eos_token_id`, `stop_strings`,
                `streamer`, `stopping_criteria`, as in Transformers.

        Returns:
            `Tensor`: prompts and new tokens `[B, T + new]`.

        Raises:
            NotImplementedError: another option, which the engine would not follow as Transformers does.
            TypeError, ValueError: prompts or states do not fit the model or each other.
            RuntimeError: the engine failed, or serves another model.
        """
        backbone = cast(PreTrainedModel, self.model.get_base_model())
        default = backbone.generation_config
        _check_options(options, default)
        options["attention_mask"] = attention_mask
        input_ids = check_prompt(backbone, input_ids, options)
        mask = options.pop("attention_mask")
        mask = query_mask(input_ids, options, default) if mask is None else mask.to(input_ids.device)
        input_ids, mask = move_padding_left(input_ids, mask)
        prefix = self.model.query_prefix(memory, len(input_ids), context_index=context_index, strict=strict)
        check_sendable(prefix)
        check_length(prefix.shape[1], input_ids, mask, backbone)
        new, longest = (generation_option(name, options, default) for name in ("max_new_tokens", "max_length"))
        if new is None and longest is not None:
            options["max_new_tokens"] = longest - input_ids.shape[1]
        end_with_positions(backbone, prefix.shape[1], mask, options)
        prompts = [
            EnginePrompt(one, ids[counts.bool()].tolist())
            for one, ids, counts in zip(prefix, input_ids, mask, strict=True)
        ]
        sampling = EngineSampling.of(options, default)
        self._compare(backbone, prompts[0], sampling.max_new_tokens)
        return self._follow(prompts, input_ids, sampling, options, default)

    def _compare(self, backbone: PreTrainedModel, prompt: EnginePrompt, most: int) -> None:
        """Raise `RuntimeError` if this model finds the engine's first greedy tokens unlikely."""
        with self._comparing:
            count = min(self._to_compare, most)
            if not count:
                return
            with closing(self._answers([prompt], EngineSampling(count, [], 0.0, 0, 1.0))) as pieces:
                tokens = [token for _, new, _ in pieces for token in new]
            if len(tokens) != count:
                raise RuntimeError("The engine stopped before its answers were complete.")
            if not _lost(backbone, prompt, tokens) <= _ROUNDING:
                raise RuntimeError(
                    "The engine does not serve the model that wrote the memory: its answer begins with the tokens "
                    f"{tokens}, which are not this model's. {_RIGHT_MODEL}"
                )
            self._to_compare -= count

    def _compare_again(self) -> None:
        """Check the model again after a failure: a restarted engine may serve another one."""
        self._to_compare = _COMPARED_TOKENS if self._check_model else 0

    def _follow(
        self,
        prompts: list[EnginePrompt],
        input_ids: Tensor,
        sampling: EngineSampling,
        options: dict[str, Any],
        default: GenerationConfig,
    ) -> Tensor:
        """Prompts and new tokens. Streamer and stopping criteria see them token by token, as in Transformers."""
        criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
        if stops := generation_option("stop_strings", options, default):
            criteria.append(StopStringCriteria(options["tokenizer"], stops))
        filler = generation_option("pad_token_id", options, default)
        filler = next(iter(sampling.stop_token_ids), 0) if filler is None else filler
        streamer = options.get("streamer")
        if streamer is not None:
            streamer.put(input_ids.cpu())
        rows: list[list[int]] = [[] for _ in prompts]
        ended, output, length = [False] * len(prompts), input_ids, 0
        with closing(self._answers(prompts, sampling)) as pieces:
            for i, tokens, last in pieces:
                if wrong := _unknown(self.model.get_base_model(), tokens):
                    raise RuntimeError(
                        "The engine does not serve the model that wrote the memory: its answer has the tokens "
                        f"{wrong[:8]}, which are not in this model's vocabulary. {_RIGHT_MODEL}"
                    )
                if not ended[i]:
                    rows[i], ended[i] = rows[i] + tokens, last
                while length < max(map(len, rows)) and all(
                    len(row) > length or end for row, end in zip(rows, ended, strict=True)
                ):
                    length += 1
                    column = [row[length - 1] if len(row) >= length else filler for row in rows]
                    output = torch.cat([output, output.new_tensor(column)[:, None]], dim=1)
                    if streamer is not None:
                        streamer.put(output[:, -1].cpu())
                    for stopped in criteria(output, cast(Any, None)).nonzero().flatten().tolist():
                        rows[stopped], ended[stopped] = rows[stopped][:length], True
                if all(ended) and length == max(map(len, rows)):
                    break
        if not all(ended):
            raise RuntimeError("The engine stopped before its answers were complete.")
        if streamer is not None:
            streamer.end()
        return output


def _unknown(backbone: Any, tokens: list[int]) -> list[int]:
    """The tokens that are not in a model's vocabulary."""
    return [token for token in tokens if not 0 <= token < backbone.get_input_embeddings().num_embeddings]


def _lost(backbone: Any, prompt: EnginePrompt, tokens: list[int]) -> float:
    """The largest gap, in nats, between the model's likeliest token and the answer's; infinite if one is unknown."""
    if _unknown(backbone, tokens):
        return math.inf
    (states,) = states_of_answers(backbone, prompt.prefix[None], [(prompt.tokens, tokens)])
    (logits,) = output_head(backbone)(states[None]).float()
    return float((logits.amax(-1) - logits[torch.arange(len(tokens)), tokens]).max())


def _check_options(options: dict[str, Any], default: GenerationConfig) -> None:
    """Raise for options, passed or from a generation configuration, that an engine would not follow."""
    asked = dict(options)
    for config in (options.get("generation_config"), default):
        if config is not None:
            asked = {k: v for k, v in config.to_diff_dict().items() if k not in _OF_CONFIGS} | asked
    wrong = [
        name
        for name, value in asked.items()
        if name not in _KNOWN and (isinstance(value, Tensor) or value) and value != _WITHOUT_EFFECT.get(name)
    ]
    if wrong:
        raise NotImplementedError(
            f"An engine does not support {', '.join(sorted(wrong))}, only {', '.join(sorted(_KNOWN))}. Leave the "
            "others out, or read with the model itself."
        )
