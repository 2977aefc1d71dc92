"""Learning rate schedules: those of Transformers, with factors for stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_wsd_schedule

from .arguments import GradMemTrainingArguments

LEAST_RATE = 0.05
"""The final learning rate, as a share of the peak."""


def own_schedule(optimizer: Any, args: GradMemTrainingArguments, steps: int) -> LambdaLR | None:
    """The schedule of warm-up, constant and decay (`decay_share`) for a run of `steps` steps; None: another one is
    configured.

    With `max_minutes` the last step is unknown, so `EndByClock` adds the decay.
    """
    if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY or args.lr_scheduler_kwargs:
        return None
    warmup = args.get_warmup_steps(steps)
    decay = 0 if args.max_minutes is not None else round(args.decay_share * steps)
    stable = max(0, steps - warmup - decay)
    return get_wsd_schedule(
        optimizer, warmup, decay, num_stable_steps=stable, decay_type="linear", min_lr_ratio=LEAST_RATE
    )


def multiply(scheduler: LambdaLR, factor: Callable[[int], float]) -> None:
    """Multiply a schedule's learning rate at each step by `factor(step)`."""

    def both(before: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: before(step) * factor(step)

    scheduler.lr_lambdas = [both(before) for before in scheduler.lr_lambdas]
    set_rates(scheduler)


def set_rates(scheduler: LambdaLR) -> None:
    """Update the optimizer's learning rates from a schedule that depends on more than the step."""
    groups = scheduler.optimizer.param_groups
    for group, base, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]  # for logging
