"""A training step that is not bound by kernel launches: one CUDA graph per kind of batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gradmem_adapter.utils.capture import static_shapes

from .optimizers import Optimizers
from .processes import average, average_gradients, world_size

Kind = TypeVar("Kind", bound=Hashable)


class GraphedStep(Generic[Kind]):
    """Loss, backward pass, clipping and the optimizer's step as one launch.

    A small model computes faster than Python launches its kernels. On a GPU the first step of a kind runs as it is (and
    compiles what is to be compiled), the second is captured, and from then on the graph is replayed. A graph repeats
    addresses, not values: the data must be made on the device by `loss` itself, with the device's default generator,
    and every batch of a kind has the same shapes. On the CPU every step runs as it is.

    Random numbers inside the model cannot be replayed for the meta-gradient in a graph: put the model in eval mode.

    Of several processes (`processes.py`) each draws a batch of the same kind, and all take the step by the mean of
    their gradients. The first step of a kind, as it is, also opens NCCL's connections for the capture that follows.

    Args:
        loss: makes a batch of the kind given and returns scalars; "loss" is differentiated, all are averaged.
        parameters: what is trained.
        max_grad_norm: to which the norm of all gradients is clipped.
        options: of `Optimizers`.
    """

    def __init__(
        self,
        loss: Callable[[Kind], Mapping[str, Tensor]],
        parameters: Sequence[nn.Parameter],
        *,
        max_grad_norm: float = 1.0,
        **options: Any,
    ) -> None:
        self.loss = loss
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("There is nothing to train: this method has no parameters of its own. Add a lora_config.")
        self.max_grad_norm = max_grad_norm
        device = self.parameters[0].device
        self.graphed = device.type == "cuda"
        self.optimizers = Optimizers(self.parameters, **options)
        self._names: dict[Kind, list[str]] = {}
        self._sums: dict[Kind, Tensor] = {}
        self._counts: dict[Kind, int] = {}
        self._graphs: dict[Kind, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device) if self.graphed else None
        self._pool = torch.cuda.graph_pool_handle() if self.graphed else None

    def __call__(self, kind: Kind, lr: float) -> None:
        """One training step on a batch of `kind`."""
        self.optimizers.lr.fill_(lr)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if not self.graphed:
            self._step(kind)
            return
        if kind not in self._sums:
            assert self._stream is not None  # for the type checker
            self._stream.wait_stream(torch.cuda.current_stream())
            # With the shapes of the capture that follows: what is compiled now must not be compiled in it.
            with torch.cuda.stream(self._stream), static_shapes():
                self._step(kind)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if kind not in self._graphs:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # The threads of NCCL's process group may ask for events meanwhile, which is nothing to the capture.
            mode = "thread_local" if world_size() > 1 else "global"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                self._step(kind)
            self._graphs[kind] = graph
        self._graphs[kind].replay()

    def _step(self, kind: Kind) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        values = dict(self.loss(kind))
        values["loss"].backward()
        average_gradients(self.parameters)
        values["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizers.step()
        self._names[kind] = list(values)
        now = torch.stack([value.detach().float() for value in values.values()])
        if kind not in self._sums:
            self._sums[kind] = torch.zeros_like(now)
        self._sums[kind] += now

    def means(self) -> dict[Kind, dict[str, float]]:
        """The mean of every scalar since the last call, by kind of batch, over all processes."""
        result = {
            kind: dict(zip(self._names[kind], average(self._sums[kind] / count).tolist(), strict=True))
            for kind, count in self._counts.items()
            if count
        }
        for kind, total in self._sums.items():
            total.zero_()
            self._counts[kind] = 0
        return result

    def close(self) -> None:
        """Drop the graphs. Until then NCCL, whose communicator they hold, waits for them when it is to end."""
        self._graphs.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """What the optimizers carry."""
        return self.optimizers.state_dict()

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up the optimizers' states. Before the first step: graphs hold the addresses of the old ones."""
        if self._graphs:
            raise RuntimeError("load_state_dict() comes too late: steps have been captured with the state they had.")
        self.optimizers.load_state_dict(states)
