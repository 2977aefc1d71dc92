"""The settings of a training run: those of Transformers' `TrainingArguments` and those of GradMem."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from gradmem_adapter.config import checks_fields
from gradmem_adapter.utils.kinds import check_kind


@checks_fields
@dataclass
class GradMemTrainingArguments(TrainingArguments):
    """Transformers' training arguments and those of GradMem.

    Args:
        remove_unused_columns (`bool`, *optional*, defaults to `False`): leave it False: the columns of a dataset are
            texts, which the collator turns into the model's inputs.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`): leave it False: a loss that is not finite
            stops training instead of being hidden.
        write_steps (`list[int]`, *optional*): K of each optimizer step is drawn from these with equal chances (a number
            listed twice comes twice as often); None: the config's `write_steps`.
        eval_write_steps (`int`, *optional*): K in evaluation; None: the config's `write_steps`.
        predict_with_generate (`bool`, *optional*, defaults to `True`): answer the queries greedily in evaluation, and
            score the texts.
        generation_max_new_tokens (`int`, *optional*): the most new tokens in an answer; None: a few more than the
            longest target.
        cuda_graphs (`bool`, *optional*, defaults to `False`): launch the forward and backward pass of a step as one
            CUDA graph, which saves the time Python takes to launch kernels: small models train several times as fast.
            Needs a model without dropout. Rows are then padded to a few lengths (`RowBatches`). On a CPU, the same
            steps run without graphs.
        torch_compile (`bool`, *optional*, defaults to `False`): compile the backbone's layers, one by one.
        context_buckets (`list[int]`, *optional*): with `cuda_graphs` and rows, the lengths in tokens that contexts are
            padded to; None: 64, 128, 256, ...
        tokens_per_batch (`int`, *optional*): with `cuda_graphs` and rows, the most context tokens in a batch, padding
            included, so that long contexts come in smaller batches than `per_device_train_batch_size`.
        queries_per_context (`int`, *optional*, defaults to `2`): with `cuda_graphs` and rows, how many of a context's
            queries are drawn for a batch.
        max_minutes (`float`, *optional*): end the run after this many minutes (in total, if it was interrupted), unless
            `max_steps` are done before. The learning rate warms up, stays constant, and falls to a twentieth by the
            end, whatever the default of `lr_scheduler_type`.
        decay_share (`float`, *optional*, defaults to `0.5`): the last share of the run, over which the learning rate
            falls, with `max_minutes` or `lr_scheduler_type="warmup_stable_decay"`.
        write_lr_factor (`float`, *optional*, defaults to `1.0`): learned write learning rates are trained at this
            multiple of the learning rate.
        muon_lr_factor (`float`, *optional*): train the matrices inside the backbone's layers with Muon (Jordan et al.,
            2024) at this multiple of the learning rate, with updates as large as AdamW's (arXiv 2502.16982); None:
            train all weights with AdamW, or what `optim` says.
        distillation_weight (`float`, *optional*, defaults to `1.0`): with a teacher, the weight of the divergence from
            it beside the cross entropy, per target token (see `Distillation`).
        distillation_temperature (`float`, *optional*, defaults to `1.0`): the temperature at which both distributions
            are compared.

    Raises:
        TypeError, ValueError: a field has an invalid value; the message names it.
    """

    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    write_steps: list[int] | None = None
    eval_write_steps: int | None = None
    predict_with_generate: bool = True
    generation_max_new_tokens: int | None = None
    cuda_graphs: bool = False
    context_buckets: list[int] | None = None
    tokens_per_batch: int | None = None
    queries_per_context: int = 2
    max_minutes: float | None = None
    decay_share: float = 0.5
    write_lr_factor: float = 1.0
    muon_lr_factor: float | None = None
    distillation_weight: float = 1.0
    distillation_temperature: float = 1.0

    def __post_init__(self) -> None:
        self._check_numbers()
        super().__post_init__()
        for name in ("write_steps", "context_buckets"):
            values = getattr(self, name)
            if values is not None and not (isinstance(values, list | tuple) and len(values)):
                raise TypeError(f"{name} must be a list of integers or None, got {values!r}.")
            for value in values or ():
                _check_number(f"Every one of {name}", value, {int}, 0 if name == "write_steps" else 1)
        self._check_reports()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would warn and ignore it
        if self.max_minutes is not None:
            self._go_by_the_clock()

    def _check_numbers(self) -> None:
        """Raise if a number is not one, or is out of range. Transformers checks few of its own."""
        hints = get_type_hints(type(self))
        for own in fields(self):
            kinds, value = set(get_args(hints[own.name]) or (hints[own.name],)), getattr(self, own.name)
            if kinds <= {int, float, bool, type(None)} and value != own.default:
                _check_number(own.name, value, kinds, LEAST.get(own.name))
        for name in POSITIVE:
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be positive, got 0.")
        if self.decay_share > 1:
            raise ValueError(f"decay_share must be between 0 and 1, got {self.decay_share!r}.")

    def _check_reports(self) -> None:
        """Raise if report_to names an unknown tracker, or one whose package is not installed."""
        get_reporting_integration_callbacks(self.report_to)
        there = {*get_available_reporting_integrations(), "flyte"}  # Transformers does not check for it
        if missing := sorted(set(self.report_to or ()) - there):
            how = 'pip install "gradmem-adapter[train]"' if missing == ["tensorboard"] else "install it"
            raise ImportError(
                f"report_to names {', '.join(missing)}, but its package is not installed. Fix: {how}, or leave it out "
                "of report_to."
            )

    def _go_by_the_clock(self) -> None:
        if self.lr_scheduler_type not in (SchedulerType.LINEAR, SchedulerType.WARMUP_STABLE_DECAY):
            raise ValueError(
                "max_minutes has its own schedule (warm-up, constant, decay), but lr_scheduler_type is "
                f"{str(self.lr_scheduler_type)!r}. Leave one of them out."
            )
        self.lr_scheduler_type = SchedulerType.WARMUP_STABLE_DECAY
        self.restore_callback_states_from_checkpoint = True  # includes the time that has passed
        if self.max_steps <= 0:
            self.max_steps = UNBOUNDED


UNBOUNDED = 10**9
"""`max_steps` of a run that ends by the clock."""


POSITIVE = (
    "distillation_temperature", "distillation_weight", "max_minutes", "muon_lr_factor", "write_lr_factor",
)  # fmt: skip
LEAST = dict.fromkeys(
    (
        *POSITIVE, "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_num_workers", "decay_share",
        "eval_write_steps", "learning_rate", "max_grad_norm", "num_train_epochs", "seed", "warmup_steps",
        "weight_decay",
    ), 0,
) | dict.fromkeys(
    (
        "generation_max_new_tokens", "gradient_accumulation_steps", "per_device_eval_batch_size",
        "per_device_train_batch_size", "queries_per_context", "tokens_per_batch",
    ), 1,
)  # fmt: skip
"""The least values of fields."""


def _check_number(name: str, value: Any, kinds: set[type], least: int | None) -> None:
    if value is None and type(None) in kinds:
        return
    if value is None:
        raise TypeError(f"{name} must not be None; leave it out for its default.")
    allowed = Real if float in kinds else Integral if int in kinds else bool
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        wanted = {Real: "a number", Integral: "an integer", bool: "True or False"}[allowed]
        raise TypeError(f"{name} must be {wanted}, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}.")


def with_defaults(args: TrainingArguments) -> GradMemTrainingArguments:
    """The same object; a plain `TrainingArguments` gets GradMem's fields with their defaults."""
    check_kind("args", args, TrainingArguments, "training arguments, such as GradMemTrainingArguments(output_dir)")
    for own in fields(GradMemTrainingArguments):
        if not hasattr(args, own.name):
            setattr(args, own.name, own.default)
    return args  # type: ignore[return-value]
