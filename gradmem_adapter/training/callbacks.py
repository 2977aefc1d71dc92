"""What ends a run early: the clock, in which it is done, or a signal, after which it can go on. And the mean of weights
that a run may end with."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .schedule import multiply, warmup_stable_decay

LOOK_EVERY = 8
"""Of several processes all look at what one of them knows every so many steps, because that waits for the GPUs."""


class EndByClock(TrainerCallback, ExportableState):
    """Ends a run after `max_minutes` of its parts together, and lets the learning rate fall in time.

    When all but `decay_share` of the time is over, the decay is planned from the steps that the clock has seen.
    Evaluation and saving count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """That are over."""
        self.mark: list[float] | None = None
        """A step in the middle of the constant part, and the seconds then: the rate is measured from there."""
        self.decay: list[int] | None = None
        """The first and the last step of the decay, once it is planned."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds, "mark": self.mark, "decay": self.decay}}

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic() - self.seconds
        if self.decay is not None:
            self._plan(state, lr_scheduler)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Look at the clock: that of process 0, because clocks differ."""
        if not due(args, state):
            return
        self.seconds = agreed(time.monotonic() - self._start, args)
        limit, step = 60 * args.max_minutes, state.global_step
        stable = (1 - args.decay_share) * limit
        if self.mark is None and self.seconds >= stable / 2:
            self.mark = [step, self.seconds]
        if self.decay is None and args.decay_share and self.seconds >= stable:
            first, then = self.mark if self.mark and step > self.mark[0] else (0, 0.0)
            rate = (step - first) / (self.seconds - then)
            self.decay = [step, step + max(1, round(rate * (limit - self.seconds)))]
            self._plan(state, lr_scheduler)
        if self.seconds >= limit:
            control.should_training_stop = control.should_save = True

    def _plan(self, state: TrainerState, scheduler: LambdaLR) -> None:
        assert self.decay is not None  # for the type checker
        first, last = self.decay
        state.max_steps = min(state.max_steps, last)
        (fall,) = warmup_stable_decay(torch.optim.SGD([torch.zeros(1)]), 0, first, last - first).lr_lambdas
        multiply(scheduler, fall)


def due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether to look at this step."""
    return args.world_size == 1 or state.global_step % LOOK_EVERY == 0


def agreed(value: float, args: TrainingArguments) -> float:
    """The number that process 0 has, in all processes: if they ended at different steps, they would wait for ever."""
    if args.world_size == 1:
        return value
    return float(broadcast(torch.tensor(float(value), dtype=torch.float64, device=args.device)).item())


class AverageWeights(TrainerCallback):
    """Lets a run end with the exponential moving average of its trained weights, W <- decay W + (1 - decay) w.

    Checkpoints on the way hold the weights themselves, and a resumed run starts its average from them.

    Args:
        decay (`float`): per step, from 0 to less than 1.
    """

    def __init__(self, decay: float) -> None:
        self._update = get_ema_multi_avg_fn(decay)
        self._averages: list[torch.Tensor] = []

    @staticmethod
    def _weights(model: nn.Module) -> list[torch.Tensor]:
        return [parameter.data for parameter in model.parameters() if parameter.requires_grad]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start from the weights as they are."""
        self._averages = [weight.clone() for weight in self._weights(model)]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the weights into the average."""
        self._update(self._averages, self._weights(model), 0)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give the model the average."""
        torch._foreach_copy_(self._weights(model), self._averages)
        self._averages = []


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step that is being computed, with a checkpoint to go on from.

    ```python
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train()
    finished = not stop.seen
    ```

    A second signal does what it always does. Outside the main thread, to which signals go, it does nothing.
    """

    def __init__(self) -> None:
        self.seen = False
        """Whether a signal has come."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.getsignal(number) or signal.SIG_DFL
                signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, *_: Any) -> None:
        self.seen = True
        self.__exit__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End here if a signal has come to process 0."""
        if due(args, state) and agreed(self.seen, args):
            self.seen = control.should_training_stop = control.should_save = True
