"""The configuration of a GradMem adapter: one field per choice of the method, validated on construction."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, PeftType, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES

MEMORY_PROJECTIONS = ("none", "shared")
LORA_PHASES = ("both", "write", "read")
MEMORY_INITS = ("normal", "vocab")
POOLINGS = ("none", "embeddings", "hidden_states")

REGISTRIES: dict[str, Collection[str]] = {}
"""What `write_optimizer` and `meta_gradient` may be: the registries of both, which `registration` puts here."""

# LoRA initialisations that leave the backbone's own weights alone: WRITE and READ must see the same backbone that
# `disable_adapter` gives back, so the ones that rewrite it (PiSSA, OLoRA, LoftQ, ...) are refused.
_SAFE_LORA_INITS = (True, False, "gaussian", "orthogonal")


@dataclass
class GradMemConfig(PeftConfig):
    """How a backbone is given a gradient-written memory (GradMem, arXiv 2603.13875).

    Use it like any PEFT configuration: `get_peft_model(backbone, GradMemConfig(...))`. Every field is checked when
    the object is made; a value that cannot work raises `ValueError` or `TypeError` naming the field, the value and
    what was expected.
    """

    # PEFT reads this from every tuner's config; GradMem adds a layer instead of replacing some.
    target_modules: ClassVar[str] = DUMMY_TARGET_MODULES

    task_type: str | TaskType | None = field(
        default=TaskType.CAUSAL_LM, metadata={"help": "Always CAUSAL_LM: GradMem needs a language-model loss."}
    )
    num_memory_tokens: int = field(
        default=16, metadata={"help": "m, the number of memory vectors a context is written into."}
    )
    write_steps: int = field(
        default=2, metadata={"help": "K, the gradient steps of WRITE; any other number may be used at call time."}
    )
    write_lr: float = field(
        default=1.0,
        metadata={"help": "The write learning rate (its initial value if `learn_write_lr`), applied per sample."},
    )
    learn_write_lr: bool = field(
        default=False, metadata={"help": "Train the write learning rate with the outer loss (it stays positive)."}
    )
    num_write_lrs: int = field(
        default=1,
        metadata={
            "help": "With `learn_write_lr`: one rate for each of the first n write steps; later steps use the n-th. "
            "First steps profit from a large rate, which in later steps overshoots."
        },
    )
    write_lr_per_element: bool = field(
        default=False,
        metadata={
            "help": "With `learn_write_lr`: one rate for each element of the memory instead of one for all, a diagonal "
            "preconditioner (Meta-SGD, arXiv 1707.09835)."
        },
    )
    write_lr_from_end: bool = field(
        default=False,
        metadata={
            "help": "With `learn_write_lr`: the first `num_write_lrs` steps have factors too, counted from the "
            "end, so that WRITE ends as suits its number of steps, and goes on as it ended beyond so many."
        },
    )
    write_optimizer: str = field(
        default="sgd", metadata={"help": "The rule of a write step: 'sgd' (the paper's) or 'adam'."}
    )
    meta_gradient: str = field(
        default="exact",
        metadata={
            "help": "How outer gradients cross a write step: 'exact' (second order), 'finite_difference' (second order "
            "at the cost and in the memory of first-order passes), 'first_order' (the write gradient counts as a "
            "constant) or 'none' (WRITE as a whole counts as a constant)."
        },
    )
    second_order_steps: int | None = field(
        default=None,
        metadata={"help": "Only the last n write steps are second order, earlier ones first order. None: all."},
    )
    finite_difference_step: float | None = field(
        default=None,
        metadata={
            "help": "With 'finite_difference': how far the memory vector that moves most is moved, as a share of its "
            "length. None: by the type the backbone computes in (see docs/meta_gradients.md)."
        },
    )
    write_clip_norm: float | None = field(
        default=None, metadata={"help": "Clip the norm of each sample's write gradient to this. None: do not."}
    )
    write_clip_value: float | None = field(
        default=None, metadata={"help": "Clip each element of the write gradient to [-value, value]. None: do not."}
    )
    memory_projection: str = field(
        default="none",
        metadata={"help": "'shared': one linear layer on the memory before it enters the model, in WRITE and READ."},
    )
    write_head: bool = field(
        default=False,
        metadata={"help": "A separate output head for WRITE, which starts as a copy of the backbone's."},
    )
    num_control_tokens: int = field(
        default=0,
        metadata={"help": "c, learned vectors on each side of the memory, one set for WRITE and one for READ."},
    )
    reconstruction_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the last write loss (before the last step) in the outer loss. Without write steps it is "
            "that of the memory WRITE starts from, with `start_from_context`."
        },
    )
    lora_config: LoraConfig | dict[str, Any] | None = field(
        default=None, metadata={"help": "A LoRA on the backbone, trained with the memory and saved with it."}
    )
    lora_phase: str = field(
        default="both", metadata={"help": "Where the LoRA is active: 'both', 'write' or 'read' alone."}
    )
    train_backbone: bool = field(
        default=False, metadata={"help": "Train all weights of the backbone. Save with `save_checkpoint`."}
    )
    start_from_context: bool = field(
        default=False,
        metadata={
            "help": "WRITE starts from the slots plus what one forward pass over [context; slots] gives at their "
            "places, times a learned gain, instead of from the slots alone."
        },
    )
    start_gain: float = field(
        default=0.1,
        metadata={
            "help": "With `start_from_context`: the gain before training. From 0 an optimizer needs as many steps as "
            "it takes to get somewhere at its learning rate; 0.1 makes what the forward pass gives about twice as "
            "large as slots from the vocabulary, in SmolLM2-135M."
        },
    )
    start_pooling: str = field(
        default="none",
        metadata={
            "help": "With `start_from_context`: vector j also begins at the mean of the j-th of m equal parts of the "
            "context. 'embeddings': what the forward pass reads is moved by the means of the embeddings, times a "
            "learned gain that starts at 1. 'hidden_states': and the means of the last hidden states are added to what "
            "it gives."
        },
    )
    memory_init: str = field(
        default="normal",
        metadata={"help": "Memory slots start as 'normal' noise or as the embeddings of random 'vocab' tokens."},
    )
    memory_init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of normal initial values (slots, control vectors)."}
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: projection starts as the identity, write head as a copy. False: all at random, for tests."
        },
    )
    query_format: str = field(
        default="text",
        metadata={
            "help": "How `GradMemPipeline` presents a query: 'text' (as it is), 'chat' (the tokenizer's chat "
            "template) or a template that contains '{query}'."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("GRADMEM")
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(
                f"task_type must be CAUSAL_LM, got {self.task_type!r}: GradMem writes with a causal language-model "
                "loss, and PEFT would pass over its forward for other tasks. Leave task_type at its default."
            )
        self._check_int("num_memory_tokens", minimum=1)
        self._check_int("write_steps", minimum=0)
        self._check_int("num_control_tokens", minimum=0)
        self._check_int("num_write_lrs", minimum=1)
        if self.second_order_steps is not None:
            self._check_int("second_order_steps", minimum=0)
        self._check_float("write_lr", positive=True)
        self._check_float("memory_init_std", positive=True)
        self._check_float("reconstruction_weight", positive=False)
        self._check_float("start_gain", positive=False)
        for name in ("write_clip_norm", "write_clip_value", "finite_difference_step"):
            if getattr(self, name) is not None:
                self._check_float(name, positive=True)
        for name in (
            "learn_write_lr", "write_lr_per_element", "write_lr_from_end", "write_head", "start_from_context",
            "train_backbone", "init_weights",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_choice("write_optimizer", REGISTRIES["write_optimizer"])
        self._check_choice("meta_gradient", (*REGISTRIES["meta_gradient"], "none"))
        self._check_choice("memory_projection", MEMORY_PROJECTIONS)
        self._check_choice("lora_phase", LORA_PHASES)
        self._check_choice("memory_init", MEMORY_INITS)
        self._check_choice("start_pooling", POOLINGS)
        if self.query_format not in ("text", "chat") and "{query}" not in str(self.query_format):
            raise ValueError(
                f"query_format must be 'text', 'chat' or a template that contains '{{query}}', "
                f"got {self.query_format!r}."
            )
        if (self.num_write_lrs > 1 or self.write_lr_per_element or self.write_lr_from_end) and not self.learn_write_lr:
            raise ValueError(
                "num_write_lrs, write_lr_per_element and write_lr_from_end have no effect without learn_write_lr=True: "
                "a rate that is not learned is the same in every step and for every element."
            )
        if self.start_pooling != "none" and not self.start_from_context:
            raise ValueError("start_pooling has no effect without start_from_context=True: set both or neither.")
        if self.meta_gradient == "none" and self.reconstruction_weight:
            raise ValueError(
                "reconstruction_weight has no effect with meta_gradient='none', where WRITE is a constant: set it to "
                "0 or choose another meta_gradient."
            )
        self.lora_config = self._as_lora_config(self.lora_config)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; the nested LoRA as its own dict, its sets as sorted lists."""
        result = {f.name: getattr(self, f.name) for f in fields(self)}
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
            value = LoraConfig(**value)
        if value is None:
            return None
        if type(value) is not LoraConfig:
            raise TypeError(f"lora_config must be a LoraConfig or its dict, got {type(value).__name__}.")
        if value.bias != "none" or value.modules_to_save or value.layer_replication or value.trainable_token_indices:
            raise ValueError(
                "lora_config may not use bias, modules_to_save, layer_replication or trainable_token_indices: they "
                "change the backbone itself, which GradMem promises to leave as it is. Set train_backbone=True to "
                "train the backbone."
            )
        if value.init_lora_weights not in _SAFE_LORA_INITS:
            raise ValueError(
                f"lora_config.init_lora_weights={value.init_lora_weights!r} rewrites the backbone's weights or needs "
                f"data; use one of {_SAFE_LORA_INITS}."
            )
        return value
