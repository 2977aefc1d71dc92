"""The configuration of a GradMem adapter: one field per choice of the method, validated on construction."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, cast, get_args

from peft import LoraConfig, PeftConfig, PeftType, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES

LearnWriteLR: TypeAlias = Literal["no", "scalar", "per_element"]
Start: TypeAlias = Literal["slots", "context", "pooled_context"]
MemoryProjection: TypeAlias = Literal["none", "shared"]
LoraPhase: TypeAlias = Literal["both", "write", "read"]
MemoryInit: TypeAlias = Literal["normal", "vocab"]

Config = TypeVar("Config")

REGISTRIES: dict[str, Collection[str]] = {}
"""The valid values of `write_optimizer` and `meta_gradient`: their registries, which `registration` enters here."""

# LoRA initialisations that do not change the backbone's own weights. WRITE and READ must see the same backbone as
# `disable_adapter` restores, so those that rewrite it (PiSSA, OLoRA, LoftQ, ...) are refused.
_SAFE_LORA_INITS = (True, False, "gaussian", "orthogonal")
# PEFT's variants of LoRA that do not change the backbone, work with input embeddings and can be saved completely. KaSA
# rewrites weights, aLoRA waits for tokens that never come, MonteCLoRA and VeLoRA have state that is not saved.
_SAFE_LORA_VARIANTS = ("use_dora", "use_bdlora")

_FROM_FILE = "gradmem_from_file"


def is_from_file(config: LoraConfig) -> bool:
    """Whether a nested LoRA comes from a file, which may have any origin, and not from the user's code."""
    return _FROM_FILE in config.__dict__


def unknown_fields(given: Collection[str], known: Collection[str]) -> str | None:
    """The unknown names, with suggestions of similar known ones; None if all are known."""
    unknown = sorted(set(given) - set(known))
    nearest = [name for field in unknown for name in difflib.get_close_matches(field, known, n=1)]
    meant = f" Did you mean {', '.join(nearest)}?" if nearest else ""
    return f"{', '.join(unknown)}.{meant}" if unknown else None


def _known(name: str, cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values of known fields. Values from a file have a `peft_type`: unknown fields, saved by another version, are
    then left out with a warning, as in PEFT."""
    known = list(inspect.signature(cls).parameters)
    if not (unknown := unknown_fields(values, known)):
        return values
    if "peft_type" not in values:  # from the user's code: probably a typing error
        raise TypeError(f"{name} has no field {unknown} See help({cls.__name__}) for all fields.")
    newer = ", ".join(sorted(values.keys() - set(known)))
    warnings.warn(
        f"{name} was saved with the fields {newer}, which this version does not know. They are ignored. If they "
        "matter, use the versions of gradmem-adapter and peft that wrote the file.",
        stacklevel=5,
    )
    return {field: value for field, value in values.items() if field in known}


def checks_fields(cls: type[Config]) -> type[Config]:
    """Decorator: a configuration checks the names of the fields that it is created with."""
    init = cls.__init__

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **_known(cls.__name__, cls, kwargs))

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


@checks_fields
@dataclass
class GradMemConfig(PeftConfig):
    """Configuration of a GradMem adapter: a backbone with a memory written by gradient descent (arXiv 2603.13875).

    Use it like any PEFT configuration: `get_peft_model(backbone, GradMemConfig(...))`. Below, m is the number of memory
    vectors, d the backbone's embedding size and K the number of write steps. PEFT's own fields
    (`base_model_name_or_path`, `inference_mode`, ...) are also available.

    Args:
        num_memory_tokens (`int`, *optional*, defaults to `16`): m, the number of memory vectors that a context is
            written into.
        write_steps (`int`, *optional*, defaults to `2`): K, the number of gradient steps in WRITE. A call may use any
            other number.
        write_lr (`float`, *optional*, defaults to `1.0`): the write learning rate, applied to each sample separately.
            With `learn_write_lr`, its value before training.
        learn_write_lr (`str`, *optional*, defaults to `"no"`): whether the outer loss trains the write learning rate,
            which stays positive. `"no"`, `"scalar"` (one rate for all elements of the memory) or `"per_element"` (one
            rate for each element, a diagonal preconditioner: Meta-SGD, arXiv 1707.09835).
        num_write_lrs (`int`, *optional*, defaults to `1`): with `learn_write_lr`, one rate (or one for each element)
            for each of the first n write steps; later steps use the n-th. A large rate helps in the first steps and
            overshoots in later ones.
        write_optimizer (`str`, *optional*, defaults to `"sgd"`): the rule of a write step: `"sgd"` (the paper's) or
            `"adam"`.
        start (`str`, *optional*, defaults to `"slots"`): what WRITE starts from. `"slots"`: the memory slots M_0, as in
            the paper. `"context"`: the slots plus a learned gain times the output of one forward pass over [context;
            slots] at their positions. `"pooled_context"`: the same, but the mean embedding of the j-th of m equal parts
            of the context, times another learned gain, is first added to slot j.
        meta_gradient (`str`, *optional*, defaults to `"exact"`): how outer gradients flow through a write step:
            `"exact"` (second order), `"finite_difference"` (second order at the time and memory cost of first-order
            passes), `"first_order"` (the write gradient is treated as a constant) or `"none"` (WRITE as a whole is
            treated as a constant).
        second_order_steps (`int`, *optional*): treat only the last n write steps as second order, and earlier ones as
            first order. `None`: all are second order.
        finite_difference_step (`float`, *optional*): with `"finite_difference"`, the largest displacement of a memory
            vector relative to its norm. `None`: chosen by the dtype that the backbone computes in.
        write_clip_norm (`float`, *optional*): clip each sample's write gradient to this norm. `None`: no clipping.
        memory_projection (`str`, *optional*, defaults to `"none"`): `"shared"` applies one linear layer to the memory
            before it enters the model, in WRITE and READ.
        write_head (`bool`, *optional*, defaults to `False`): use a separate output head for WRITE, initialised as a
            copy of the backbone's.
        num_control_tokens (`int`, *optional*, defaults to `0`): c, the number of learned vectors on each side of the
            memory; WRITE and READ each have a set of their own.
        reconstruction_weight (`float`, *optional*, defaults to `0.0`): weight of the last write loss (before the last
            step) in the outer loss. Without write steps, the loss of the memory that WRITE starts from, if that memory
            depends on the context.
        lora_config (`LoraConfig` or `dict`, *optional*): a LoRA on the backbone, trained and saved with the memory.
        lora_phase (`str`, *optional*, defaults to `"both"`): when the LoRA is active: `"both"`, or only `"write"` or
            `"read"`.
        train_backbone (`bool`, *optional*, defaults to `False`): train all weights of the backbone. The model must then
            be saved with `save_checkpoint`.
        memory_init (`str`, *optional*, defaults to `"normal"`): initialise the memory slots with `"normal"` noise or
            with the embeddings of random `"vocab"` tokens.
        memory_init_std (`float`, *optional*, defaults to `0.02`): standard deviation of normal initial values (slots,
            control vectors).
        query_format (`str`, *optional*, defaults to `"text"`): how `GradMemPipeline` presents a query: `"text"` (as it
            is), `"chat"` (the tokenizer's chat template) or a template that contains `"{query}"`.
        trained_length (`int`, *optional*): length in tokens of the longest context that the adapter was trained to
            write. `None`: unknown.
        refusal (`str`, *optional*): what the adapter was trained to answer if memory does not hold the answer. The
            scores of `GradMemPipeline.generate(return_scores=True)` then depend on the likelihood of this refusal.
            `None`: no refusal; scores depend on the likelihood of the answer itself.
        score_calibration (`tuple[float, float]`, *optional*): scale and offset, fitted on validation data, of the
            logistic map from either likelihood to the probability that memory holds the answer. `None`: no calibration.
        probe_backbone (`bool`, *optional*, defaults to `True`): try the backbone on a few tokens when the adapter is
            attached, and refuse one on which GradMem would be wrong. This is not saved: an adapter loaded for inference
            was tried when it was made.

    Raises:
        TypeError, ValueError: a field is unknown or has an invalid value; the message names the field, the value and
            what was expected.
    """

    # PEFT reads this from every tuner's config; GradMem adds a layer instead of replacing some.
    target_modules: ClassVar[str] = DUMMY_TARGET_MODULES

    task_type: str | TaskType | None = TaskType.CAUSAL_LM
    num_memory_tokens: int = 16
    write_steps: int = 2
    write_lr: float = 1.0
    learn_write_lr: LearnWriteLR = "no"
    num_write_lrs: int = 1
    write_optimizer: str = "sgd"
    start: Start = "slots"
    meta_gradient: str = "exact"
    second_order_steps: int | None = None
    finite_difference_step: float | None = None
    write_clip_norm: float | None = None
    memory_projection: MemoryProjection = "none"
    write_head: bool = False
    num_control_tokens: int = 0
    reconstruction_weight: float = 0.0
    lora_config: LoraConfig | dict[str, Any] | None = None
    lora_phase: LoraPhase = "both"
    train_backbone: bool = False
    memory_init: MemoryInit = "normal"
    memory_init_std: float = 0.02
    query_format: str = "text"
    trained_length: int | None = None
    refusal: str | None = None
    score_calibration: tuple[float, float] | None = None
    probe_backbone: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # A file says its peft_type and holds a nested dict. `dataclasses.replace` passes a peft_type, but a LoraConfig.
        from_file = self.peft_type is not None and isinstance(self.lora_config, dict)
        self.peft_type = PeftType("GRADMEM")
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(
                f"task_type must be CAUSAL_LM, got {self.task_type!r}: GradMem writes with a causal language-model "
                "loss, and for other tasks PEFT would not call its forward. Leave task_type out."
            )
        self._check_numbers()
        self._check_choices()
        if self.score_calibration is not None:
            self._check_calibration()
        if self.refusal is not None and not (isinstance(self.refusal, str) and self.refusal.strip()):
            raise ValueError(f"refusal must be a non-empty text or None, got {self.refusal!r}.")
        if self.num_write_lrs > 1 and self.learn_write_lr == "no":
            raise ValueError(
                "num_write_lrs has no effect with learn_write_lr='no': a rate that is not learned is the same in every "
                "step. Use learn_write_lr='scalar' or 'per_element'."
            )
        if self.meta_gradient == "none" and self.reconstruction_weight:
            raise ValueError(
                "reconstruction_weight has no effect with meta_gradient='none', which treats WRITE as a constant. Set "
                "it to 0 or choose another meta_gradient."
            )
        self.lora_config = self._as_lora_config(self.lora_config)
        if from_file:
            self.lora_config.__dict__[_FROM_FILE] = True  # copies keep it

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Make a configuration from the contents of a file. Called by PEFT."""
        return super().from_peft_type(**{"peft_type": "GRADMEM"} | kwargs)

    def _check_numbers(self) -> None:
        self._check_int("num_memory_tokens", minimum=1)
        self._check_int("write_steps", minimum=0)
        self._check_int("num_control_tokens", minimum=0)
        self._check_int("num_write_lrs", minimum=1)
        if self.second_order_steps is not None:
            self._check_int("second_order_steps", minimum=0)
        if self.trained_length is not None:
            self._check_int("trained_length", minimum=1)
        self._check_float("write_lr", positive=True)
        self._check_float("memory_init_std", positive=True)
        self._check_float("reconstruction_weight", positive=False)
        for name in ("write_clip_norm", "finite_difference_step"):
            if getattr(self, name) is not None:
                self._check_float(name, positive=True)

    def _check_choices(self) -> None:
        for name in ("write_head", "train_backbone", "probe_backbone"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_choice("write_optimizer", REGISTRIES["write_optimizer"])
        self._check_choice("meta_gradient", (*REGISTRIES["meta_gradient"], "none"))
        self._check_choice("learn_write_lr", get_args(LearnWriteLR))
        self._check_choice("start", get_args(Start))
        self._check_choice("memory_projection", get_args(MemoryProjection))
        self._check_choice("lora_phase", get_args(LoraPhase))
        self._check_choice("memory_init", get_args(MemoryInit))
        if self.query_format not in ("text", "chat") and "{query}" not in str(self.query_format):
            raise ValueError(
                f"query_format must be 'text', 'chat' or a template that contains '{{query}}', "
                f"got {self.query_format!r}."
            )

    def _check_calibration(self) -> None:
        try:
            scale, offset = map(float, cast(tuple[float, float], self.score_calibration))
        except (TypeError, ValueError):
            scale = offset = math.nan
        if not (0 < scale < math.inf and math.isfinite(offset)):
            raise ValueError(
                "score_calibration must be two finite numbers, a positive scale and an offset, got "
                f"{self.score_calibration!r}."
            )
        self.score_calibration = scale, offset

    @property
    def prefix_length(self) -> int:
        """The number of positions that the memory takes with its control vectors, m + 2c."""
        return self.num_memory_tokens + 2 * self.num_control_tokens

    @property
    def segment_tokens(self) -> int | None:
        """Default length in tokens of a segment of a long text: two per memory vector (memory keeps more of such
        segments than of longer ones, docs/long_texts.md), at most the trained length. None if that is unknown."""
        return None if self.trained_length is None else min(self.trained_length, 2 * self.num_memory_tokens)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, like PEFT's own. If `PeftModel.save_pretrained` calls it, it also warns about a
        trained backbone, which is not saved."""
        if self.train_backbone and "auto_mapping_dict" in kwargs:  # called last, after the weights are saved
            warnings.warn(
                "save_pretrained saves only the adapter, not the backbone that is trained with it "
                "(train_backbone=True). Save both with gradmem_adapter.save_checkpoint(model, tokenizer, path).",
                stacklevel=3,
            )
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is saved, in JSON-ready values: the nested LoRA as a dict with sorted lists for its
        sets, and without `probe_backbone`."""
        result = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "probe_backbone"}
        if isinstance(self.lora_config, LoraConfig):
            lora = self.lora_config.to_dict()
            result["lora_config"] = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.items()}
        return result

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}.")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if value > sys.maxsize:
            raise ValueError(f"{name} must be at most {sys.maxsize}, got {value}.")

    def _check_float(self, name: str, positive: bool) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value}.")

    def _check_choice(self, name: str, choices: Collection[str]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}.")

    @staticmethod
    def _as_lora_config(value: LoraConfig | dict[str, Any] | None) -> LoraConfig | None:
        if isinstance(value, dict):
            value = LoraConfig(**_known("lora_config", LoraConfig, value))
        if value is None:
            return None
        if type(value) is not LoraConfig:
            raise TypeError(f"lora_config must be a LoraConfig or its dict, got {type(value).__name__}.")
        if value.bias != "none" or value.modules_to_save or value.layer_replication or value.trainable_token_indices:
            raise ValueError(
                "lora_config may not use bias, modules_to_save, layer_replication or trainable_token_indices: they "
                "change the backbone itself, which GradMem must not do. Set train_backbone=True to train the backbone."
            )
        variants = {field.name for field in fields(value) if field.metadata.get("is_lora_variant")}
        if asked := sorted(name for name in variants.difference(_SAFE_LORA_VARIANTS) if getattr(value, name)):
            raise ValueError(
                f"lora_config may not use {', '.join(asked)}: of PEFT's variants of LoRA, GradMem supports only "
                f"{' and '.join(_SAFE_LORA_VARIANTS)}. Leave it out."
            )
        if value.init_lora_weights not in _SAFE_LORA_INITS:
            raise ValueError(
                f"lora_config.init_lora_weights={value.init_lora_weights!r} rewrites the backbone's weights or needs "
                f"data; use one of {_SAFE_LORA_INITS}."
            )
        return value
