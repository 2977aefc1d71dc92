"""What ends a run early: the clock, in which it is done, or a signal, after which it can go on. And the mean of weights
that a run may end with."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from .schedule import LEAST_RATE, multiply, set_rates
from .sharding import own_part

LOOK_EVERY = 8
"""Of several processes all look at what one of them knows at least every so many steps; it waits for the GPUs."""


class _Together(TrainerCallback):
    """Asks process 0 at the same steps in all processes, which would wait for ever if they ended at different ones."""

    def __init__(self) -> None:
        self._steps, self._left = 1, 1
        """Between two looks, and until the next one."""
        self._looked, self._pace = math.nan, math.inf
        """When this process last did, and the seconds that it took for a step before that."""

    def _agreed(self, value: float, args: TrainingArguments) -> float | None:
        """The number that process 0 has; None at a step at which nobody looks, as for a second or so at most."""
        if args.world_size == 1:
            return value
        self._left -= 1
        if self._left:
            return None
        mine = torch.tensor([value, self._pace], dtype=torch.float64, device=args.device)
        value, pace = broadcast(mine).tolist()
        now = time.monotonic()  # the GPU has done by now what it was given
        if now > self._looked:
            self._pace = (now - self._looked) / self._steps
        self._looked = now
        self._steps = self._left = max(1, min(LOOK_EVERY, int(1 / pace)))
        return value


class EndByClock(_Together, ExportableState):
    """Ends a run after `max_minutes` of its parts together, and lets the learning rate fall in time.

    Over the last `decay_share` of the time it falls with the clock, not with a number of steps: the rate of steps is
    another once everything is compiled. Evaluation and saving count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        """That are over."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic() - self.seconds
        multiply(lr_scheduler, lambda step: self.share_of_rate(args))

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Look at the clock: that of process 0, because clocks differ."""
        seconds = self._agreed(time.monotonic() - self._start, args)
        if seconds is None:
            return
        self.seconds = seconds
        set_rates(lr_scheduler)
        if self.seconds >= 60 * args.max_minutes:
            control.should_training_stop = control.should_save = True

    def share_of_rate(self, args: Any) -> float:
        """What is left of the learning rate, as the clock was last seen."""
        limit = 60 * args.max_minutes
        over = self.seconds - (1 - args.decay_share) * limit
        return max(LEAST_RATE, 1 - (1 - LEAST_RATE) * over / (args.decay_share * limit)) if over > 0 else 1.0


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
        if isinstance(model, FSDPModule):
            model.reshard()  # each process averages its own part
        return [own_part(parameter.data) for parameter in model.parameters() if parameter.requires_grad]

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


class StopOnSignal(_Together):
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
        super().__init__()
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
        if self._agreed(self.seen, args):
            self.seen = control.should_training_stop = control.should_save = True
