"""Runs that end by the clock or by a signal, and are resumed."""

import os
import signal

import pytest
import torch
from test_trainer import logs, make, rows, same, trainer, weights
from transformers import TrainerCallback, TrainerControl, TrainerState

from gradmem_adapter.training import GradMemTrainingArguments, callbacks
from gradmem_adapter.training.callbacks import LOOK_EVERY, EndByClock, StopOnSignal


class Clock:
    """A clock that counts training steps: one step a second."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Tick(TrainerCallback):
    def __init__(self, clock, seconds=1.0):
        self.clock, self.seconds = clock, seconds

    def on_step_begin(self, *args, **kwargs):
        self.clock.now += self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


class TestEndByClock:
    def run(self, path, clock, **options):
        defaults = {"max_steps": -1, "max_minutes": 20 / 60, "warmup_steps": 4, "learning_rate": 1.0}
        return trainer(make(), path, rows(3), callbacks=[Tick(clock)], **defaults | options)

    def test_the_learning_rate_follows_the_clock(self, tmp_path, clock):
        run = self.run(tmp_path, clock)
        run.train()
        assert run.state.global_step == 20
        rates = logs(run, "learning_rate")
        assert rates[:4] == pytest.approx([0.05, 0.2875, 0.525, 0.7625])
        assert rates[4:11] == pytest.approx([1.0] * 7)
        assert rates[10:20] == pytest.approx([1 - 0.95 * i / 10 for i in range(10)])

    def test_a_run_in_parts_equals_one_run(self, tmp_path, clock):
        """Both in its schedule and in its weights."""
        whole = self.run(tmp_path / "whole", clock)
        whole.train()
        for stop in (5, 13, 99):
            part = self.run(tmp_path / "parts", clock, save_strategy="steps", save_steps=1)

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, stop=stop, **kwargs):
                    control.should_training_stop |= state.global_step >= stop

            part.add_callback(Stop())
            part.train(resume_from_checkpoint=part.has_checkpoint() or None)
            clock.now += 1000  # between the parts
        assert part.state.global_step == 20
        assert logs(part, "learning_rate") == pytest.approx(logs(whole, "learning_rate"))
        assert same(weights(part.model), weights(whole.model))

    def test_a_run_that_slows_down_still_ends_in_time(self, tmp_path, clock):
        run = self.run(tmp_path, clock)

        class Slower(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.now += 9.0 if state.global_step > 12 else 0.0

        run.add_callback(Slower())
        run.train()
        assert run.state.global_step == 14

    def test_a_run_that_speeds_up_uses_all_its_time(self, tmp_path, clock):
        """As when the first steps compile: 8 take a second each, and 48 a quarter of a second."""
        run = self.run(tmp_path, clock)

        class Faster(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.now -= 0.75 if state.global_step >= 8 else 0.0

        run.add_callback(Faster())
        run.train()
        assert run.state.global_step == 8 + 48
        assert logs(run, "learning_rate")[-1] == pytest.approx(1 - 0.95 * 9.75 / 10)

    def test_without_a_decay_the_rate_is_the_same_to_the_end(self, tmp_path, clock):
        run = self.run(tmp_path, clock, decay_share=0)
        run.train()
        assert run.state.global_step == 20
        assert set(logs(run, "learning_rate")[4:]) == {1.0}

    def test_max_steps_can_end_a_run_earlier(self, tmp_path, clock):
        run = self.run(tmp_path, clock, max_steps=15)
        run.train()
        assert run.state.global_step == 15

    def test_a_schedule_without_a_clock(self, tmp_path):
        run = trainer(
            make(), tmp_path, rows(3), max_steps=10, lr_scheduler_type="warmup_stable_decay", warmup_steps=2,
            decay_share=0.5, learning_rate=1.0,
        )  # fmt: skip
        run.train()
        rates = logs(run, "learning_rate")
        assert rates[2:6] == pytest.approx([1.0] * 4)
        assert rates[6:] == pytest.approx([0.81, 0.62, 0.43, 0.24])


@pytest.mark.parametrize("seconds", [25.0, 0.3, 0.01])
def test_several_processes_end_within_a_second_or_a_step(monkeypatch, clock, seconds):
    """After a minute; if steps are short, the processes agree on the time only every few steps."""
    looks = []
    monkeypatch.setattr(callbacks, "broadcast", lambda value: looks.append(value) or value)
    args, control = GradMemTrainingArguments(max_minutes=1, report_to="none"), TrainerControl()
    monkeypatch.setattr(GradMemTrainingArguments, "world_size", 2)
    callback, state = EndByClock(), TrainerState()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callback.on_train_begin(args, state, control, lr_scheduler=schedule)
    while not control.should_training_stop:
        clock.now += seconds
        state.global_step += 1
        callback.on_step_end(args, state, control, lr_scheduler=schedule)
    assert state.global_step * seconds < 60 + max(seconds, 1)
    assert len(looks) <= 3 + state.global_step / min(LOOK_EVERY, max(1, int(0.99 / seconds)))


class Raise(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)
    run = trainer(make(), tmp_path, rows(3), callbacks=[Raise(number)], max_steps=9)
    with StopOnSignal() as stop:
        run.add_callback(stop)
        run.train()
    assert stop.seen
    assert run.state.global_step == 2
    assert run.has_checkpoint()
    assert signal.getsignal(number) is before


def test_a_run_without_a_signal_is_not_stopped(tmp_path):
    run = trainer(make(), tmp_path, rows(3), max_steps=2)
    with StopOnSignal() as stop:
        run.add_callback(stop)
        run.train()
    assert not stop.seen
