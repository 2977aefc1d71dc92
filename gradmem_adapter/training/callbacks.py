"""Callbacks that end a run by the clock, or stop it on a signal so that it can be resumed."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from .schedule import LEAST_RATE, multiply, set_rates

LOOK_EVERY = 8
"""The most steps between two exchanges with process 0; an exchange waits for the GPUs."""


class _Together(TrainerCallback):
    """Asks process 0 at the same steps in all processes, which would deadlock if they ended at different steps."""

    def __init__(self) -> None:
        self._steps, self._left = 1, 1
        """Steps between two exchanges, and steps until the next one."""
        self._looked, self._pace = math.nan, math.inf
        """The time of the last exchange, and the seconds per step before it."""

    def _agreed(self, value: float, args: TrainingArguments) -> float | None:
        """The value of process 0. None at steps without an exchange, for about a second at most."""
        if args.world_size == 1:
            return value
        self._left -= 1
        if self._left:
            return None
        mine = torch.tensor([value, self._pace], dtype=torch.float64, device=args.device)
        value, pace = broadcast(mine).tolist()
        now = time.monotonic()  # the GPU has finished its work by now
        if now > self._looked:
            self._pace = (now - self._looked) / self._steps
        self._looked = now
        self._steps = self._left = max(1, min(LOOK_EVERY, int(1 / pace)))
        return value


class EndByClock(_Together, ExportableState):
    """Ends a run after `max_minutes`, counting all its parts, and decays the learning rate in time.

    Over the last `decay_share` of the time, the rate decays by the clock and not by steps, because steps get faster
    once everything is compiled. Evaluation and saving count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        """The seconds that have passed."""

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic() - self.seconds
        multiply(lr_scheduler, lambda step: self.share_of_rate(args))

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Check the clock of process 0, because clocks differ."""
        seconds = self._agreed(time.monotonic() - self._start, args)
        if seconds is None:
            return
        self.seconds = seconds
        set_rates(lr_scheduler)
        if self.seconds >= 60 * args.max_minutes:
            control.should_training_stop = control.should_save = True

    def share_of_rate(self, args: Any) -> float:
        """The factor on the learning rate at the last reading of the clock."""
        decay = 60 * args.max_minutes * args.decay_share
        over = self.seconds - (60 * args.max_minutes - decay)
        return max(LEAST_RATE, 1 - (1 - LEAST_RATE) * over / decay) if over > 0 and decay else 1.0


class StopOnSignal(_Together):
    """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint to resume from.

    ```python
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train()
    finished = not stop.seen
    ```

    A second signal acts as usual. Outside the main thread, which receives signals, this does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        """Whether a signal was received."""
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
        """End the run if process 0 received a signal."""
        if self._agreed(self.seen, args):
            self.seen = control.should_training_stop = control.should_save = True
