"""A training run of captured steps: the loop, its log, and going on where it was interrupted."""

from __future__ import annotations

import math
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gradmem_adapter.checkpoint import check_tensors
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.utils.files import replacing

from .errors import TrainingDiverged
from .graphed_step import GraphedStep
from .optimizers import layer_matrices
from .processes import agree, barrier, rank, share_weights, world_size
from .speed import compiled_layers, fast_matmul, maskless_attention


class KindOfBatch(Hashable, Protocol):
    """What decides the shapes and the precision of a step, and so the graph that it is captured in."""

    @property
    def name(self) -> str:
        """As a log names it."""


KindT = TypeVar("KindT", bound=KindOfBatch)
KindT_co = TypeVar("KindT_co", bound=KindOfBatch, covariant=True)


class Plan(Protocol[KindT_co]):
    """What a run does at each step."""

    @property
    def steps(self) -> int: ...
    @property
    def minutes(self) -> float | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def muon_rate(self) -> float | None: ...
    @property
    def write_rate_factor(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def compile(self) -> bool: ...
    def lr_at(self, step: int, share: float) -> float:
        """The learning rate of a step, after such a share of the run."""

    def kind_at(self, step: int) -> KindT_co:
        """The batch of a step, drawn by its number alone, so that a resumed run draws the same."""


def lr_share(step: int, share: float, warmup_steps: int, decay_share: float) -> float:
    """The share of the learning rate at a step: a warm-up, then 1, then over the last of the run a fall to a twentieth.

    Args:
        share: of the run that is over.
        decay_share: of the run, over which it falls.
    """
    left = (1 - share) / decay_share if decay_share else 1.0
    return min(1.0, (step + 1) / max(1, warmup_steps), max(0.05, left))


@dataclass
class RunProgress:
    """What a callback is told every `log_every` steps."""

    step: int
    seconds: float
    """Of training alone, in this run."""
    means: dict[str, dict[str, float]]
    """By kind of batch, as "N=16 K=1"."""


def run_graphed(
    model: nn.Module,
    loss: Callable[[KindT], Mapping[str, Tensor]],
    plan: Plan[KindT],
    output: Path,
    *,
    device: torch.device | str,
    max_seconds: float = math.inf,
    log_every: int = 50,
    save_seconds: float = 60,
    stop: Callable[[RunProgress], bool] | None = None,
    callback: Callable[[RunProgress], None] | None = None,
) -> bool:
    """Train `model` in place, going on from `output/last` if a run was interrupted there.

    Of several processes (`processes.py`) each draws batches of its own; process 0 saves, and what it finds (the time,
    `stop`, a signal) ends all at the same step.

    Args:
        model: on `device`; in eval mode, so that captured steps need no random state of the model.
        loss: makes a batch of the kind given, on the device, and returns scalars; "loss" is differentiated.
        plan: what is trained when. With `minutes` the run is done after so many minutes of training, those of earlier
            parts counted, if not before by its steps; what is scheduled goes by whichever is nearer to the end.
        output: a directory; `last/` in it holds the trained weights, the optimizer and the step.
        max_seconds: stop (and save) after so much training.
        save_seconds: save at the first log after so much training since the last time.
        stop: asked at each log; True ends the run, which goes on from there another time.
        callback: told at each log, in every process.

    Returns:
        Whether the run is done.

    Raises:
        TrainingDiverged: the loss is no longer finite; `output/last` is the last good state.
        KeyboardInterrupt: Ctrl-C or SIGTERM, which end the run after the step that is being computed, and save it.
    """
    device = torch.device(device)
    step_on = GraphedStep(
        loss,
        [p for p in model.parameters() if p.requires_grad],
        betas=plan.betas,
        weight_decay=plan.weight_decay,
        matrices=[] if plan.muon_rate is None else layer_matrices(model),
        muon_rate=plan.muon_rate or 0.0,
        factors={p: plan.write_rate_factor for name, p in model.named_parameters() if "gradmem_log_write_lr" in name},
        max_grad_norm=plan.max_grad_norm,
    )
    torch.manual_seed(plan.seed)
    step, earlier = _resume(output / "last", model, step_on)
    if agree(step) != (step,):
        raise ValueError(
            f"Process {rank()} finds step {step} in {output / 'last'} and process 0 another: all processes need the "
            "same files. Put the run into a directory that they share."
        )
    share_weights(model)
    if rank():  # the random state that was seeded or saved is that of process 0
        torch.manual_seed(plan.seed + rank() + step * world_size())
    start = saved = time.perf_counter()
    within = math.inf if plan.minutes is None else 60 * plan.minutes

    def share() -> float:
        return max(step / plan.steps, (earlier + time.perf_counter() - start) / within)

    fast = compiled_layers(model, plan.compile and device.type == "cuda")
    with closing(step_on), fast_matmul(), maskless_attention(model), fast, interruption() as interrupted:
        (passed,) = agree(share())
        while passed < 1:
            step_on(plan.kind_at(step), plan.lr_at(step, passed))
            step += 1
            passed, cut = agree(share(), interrupted())
            done = passed >= 1
            if step % log_every and not done and not cut:
                continue
            means = {kind.name: values for kind, values in step_on.means().items()}
            if not all(math.isfinite(v) for values in means.values() for v in values.values()):
                raise TrainingDiverged(
                    f"The loss or a gradient is no longer finite at step {step} ({means}). The last good state, of "
                    f"step {step_of(output / 'last')}, is in {output / 'last'}. Lower the learning rate or set "
                    "write_clip_norm, and start again from there."
                )
            progress = RunProgress(step, time.perf_counter() - start, means)
            if callback is not None:
                callback(progress)
            stopped = progress.seconds > max_seconds or (stop is not None and stop(progress))
            over, cut = agree(stopped, interrupted())
            if rank() == 0 and (done or over or cut or time.perf_counter() - saved > save_seconds):
                _save(output / "last", model, step_on, step, earlier + progress.seconds)
                saved = time.perf_counter()
            if done or over or cut:
                barrier()  # what was saved can be read by all
            if cut:
                raise KeyboardInterrupt
            if done or over:
                return done
    return True


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait until they are asked for; a second one does what it always does."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    seen = False

    def remember(*_: Any) -> None:
        nonlocal seen
        seen = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: seen
    finally:
        restore()


def scalars(output: GradMemOutput, hits: Tensor | None) -> dict[str, Tensor]:
    """What a run logs of a step. Args: hits: [R], whether each query's target is the first choice throughout."""
    values: dict[str, Tensor | None] = {"loss": output.loss, "target_loss": output.target_loss}
    values["exact_match"] = None if hits is None else hits.float().mean()
    if output.write_losses is not None and output.write_losses.shape[1]:
        values["first_write_loss"] = output.write_losses[:, 0].mean()
        values["last_write_loss"] = output.write_losses[:, -1].mean()
    if output.memory is not None:
        values["memory_norm"] = torch.linalg.vector_norm(output.memory.detach(), dim=(1, 2)).mean()
    return {name: value for name, value in values.items() if value is not None}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _state_file(directory: Path) -> Path:
    return directory / "state.pt"


def step_of(directory: Path) -> int:
    """The step that a run was saved at in `directory`; 0 where there is none."""
    file = _state_file(directory)
    return int(torch.load(file, weights_only=True, map_location="cpu")["step"]) if file.exists() else 0


def _save(directory: Path, model: nn.Module, step_on: GraphedStep[Any], step: int, seconds: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        "weights": trained(model),
        "optimizer": step_on.state_dict(),
        "step": step,
        "seconds": seconds,
        "random": _random(next(model.parameters()).device).get_rng_state(),
    }
    with replacing(_state_file(directory)) as temporary:
        torch.save(state, temporary)


def _resume(directory: Path, model: nn.Module, step_on: GraphedStep[Any]) -> tuple[int, float]:
    """Take up what was saved: its step, and the seconds of training that it took."""
    file = _state_file(directory)
    if not file.exists():
        return 0, 0.0
    try:
        state = torch.load(file, weights_only=True, map_location=next(model.parameters()).device)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it to train from the beginning.") from error
    check_tensors(file, state["weights"], trained(model))
    model.load_state_dict(state["weights"], strict=False)
    step_on.load_state_dict(state["optimizer"])
    random, drawn = _random(next(model.parameters()).device), state["random"].cpu()
    if random.get_rng_state().shape == drawn.shape:
        random.set_rng_state(drawn)
    else:
        warnings.warn(
            f"{file} is of a run on another kind of device. It goes on from there, with other batches than it would "
            "have drawn on that one.",
            stacklevel=3,
        )
    return int(state["step"]), float(state["seconds"])


def _random(device: torch.device) -> Any:
    """Where the random state of the data is: they are made on the device."""
    return torch.cuda if device.type == "cuda" else torch.random
