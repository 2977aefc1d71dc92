"""WRITE within the available memory: the fastest plan that fits, and a more frugal one if it runs out of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.utils.backbone import device_of
from gradmem_adapter.utils.hardware import SATURATED, SHARE_OF_FREE_MEMORY, UNCHECKED, free_memory
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loop import RunPass
from gradmem_adapter.write.loss import Pass
from gradmem_adapter.write.plan import Footprint, Plan, plans

CPU = torch.device("cpu")
MOST_CORRECTED = 2.0
"""The largest correction of an estimate: memory may have run out because of another process."""
FRUGAL = 0.85
"""After running out of memory: the share of the last plan's memory that the next plan may take at most."""
MaxMemory: TypeAlias = int | Literal["auto"]
"""Bytes that contexts may take in addition to the model; "auto": what the device has free."""


class Budget:
    """The memory that WRITE takes with one model: measured on a few tokens, and corrected upwards if that was too
    little.

    Args:
        backbone (`PreTrainedModel`): the causal LM, on its device and in its dtype. The budget holds only a weak
            reference to it.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        self._backbone = ref(backbone)
        self._footprints: dict[Hashable, Footprint] = {}
        self._correction = 1.0  # a factor
        self.failures = 0
        """How often a plan ran out of memory."""

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Budget:
        """The one budget of a causal LM, kept for as long as the model lives."""
        return _budgets.setdefault(backbone, cls(backbone))

    def bytes(self, plan: Plan, length: int, compiled: bool = False) -> float:
        """An estimate of the bytes that a plan takes for contexts of `length` tokens each."""
        return self._correction * self._footprint().bytes(plan, length, compiled)

    def plans(self, batch: int, length: int, max_memory: MaxMemory, compiled: bool = False) -> list[Plan]:
        """The fastest plan that fits, followed by ever more frugal ones to fall back on.

        Args:
            batch (`int`): how many contexts.
            length (`int`): the tokens of the longest context.
            max_memory (`int` or `"auto"`): as in `WriteOptions`.
            compiled (`bool`, *optional*, defaults to `False`): the layers are compiled.

        Raises:
            MemoryError: no plan fits. Without this error, the system would kill a process on a CPU without a message.
        """
        footprint = self._footprint()
        device = footprint.device
        left = plans(batch, length, footprint.layers, device)
        needed = {chosen: self.bytes(chosen, length, compiled) for chosen in left}
        unchecked = max_memory == "auto" and needed[left[0]] < UNCHECKED
        room = needed[left[0]] if unchecked else free_memory(device) if max_memory == "auto" else max_memory
        if left[-1].offloaded and footprint.layers * length * footprint.inputs > free_memory(CPU):
            left = [chosen for chosen in left if not chosen.offloaded]
        least = min(left, key=needed.__getitem__)
        found: list[Plan] = []
        for chosen in left:
            if needed[chosen] <= (FRUGAL * needed[found[-1]] if found else room):
                found.append(chosen)
        if not found:
            raise MemoryError(
                f"Writing {'a context' if batch == 1 else 'one context after the other'} of {length:,} tokens takes "
                f"about {needed[least] / 1e9:.2g} GB at least, but only {room / 1e9:.2g} GB are "
                f"{'free' if max_memory == 'auto' else 'allowed'}. Write a long text in segments with "
                "GradMemPipeline.write_document (or gradmem write --store), or load the model in bfloat16, which "
                "halves this."
            )
        return found if found[-1] == least else [*found, least]

    def exceeded(self, plan: Plan, following: Plan, length: int, compiled: bool = False) -> None:
        """Correct the estimate after a plan ran out of memory, and warn the first time that this happens."""
        footprint = self._footprint()
        seen = free_memory(footprint.device) / footprint.bytes(following, length, compiled)
        self._correction = max(self._correction, min(seen, MOST_CORRECTED))
        self.failures += 1
        if self.failures == 1:
            warnings.warn(
                f"Out of memory in WRITE with {plan}; continuing with {following}. Set max_memory to limit memory from "
                "the start.",
                RuntimeWarning,
                stacklevel=2,
            )

    def tokens(self, max_memory: MaxMemory = "auto") -> int:
        """How many tokens, including padding, to write at once: at least 1, at most what saturates the device."""
        device = self._footprint().device
        share = SHARE_OF_FREE_MEMORY.get(device.type, SHARE_OF_FREE_MEMORY["cpu"])
        room = share * free_memory(device) if max_memory == "auto" else max_memory
        most = SATURATED.get(device.type, SATURATED["cpu"])
        each = self.bytes(Plan(most), 1) / most  # includes a token's share of the logits held at once
        return max(1, min(int(room / each), most))

    def _footprint(self) -> Footprint:
        backbone = self._backbone()
        if backbone is None:
            raise ReferenceError("The model of this budget no longer exists.")
        device = device_of(backbone)
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        key = device, backbone.dtype, backbone.config._attn_implementation, backbone.training, autocast
        if key not in self._footprints:
            self._footprints[key] = Footprint.of(backbone)
        return self._footprints[key]


_budgets: WeakKeyDictionary[PreTrainedModel, Budget] = WeakKeyDictionary()


class BoundedPass:
    """A `RunPass` that follows a plan, and switches to the next one when memory runs out.

    Args:
        budget (`Budget`): the model's budget.
        plans (`list[Plan]`): the plan to follow, then more frugal ones.
        pass_of (`Callable`): makes the pass for a plan; the pass gets at most `plan.rows` rows.
        compiled (`bool`, *optional*, defaults to `False`): its layers are compiled.
    """

    def __init__(
        self, budget: Budget, plans: list[Plan], pass_of: Callable[[Plan], RunPass], compiled: bool = False
    ) -> None:
        self.budget, self.plans, self.pass_of, self.compiled = budget, plans, pass_of, compiled
        self.run = pass_of(plans[0])

    def __call__(self, memory: Tensor, context: Context, gradient: bool, recovered: bool) -> Pass:
        while True:
            try:
                return self._by_parts(memory, context, gradient, recovered)
            except torch.cuda.OutOfMemoryError:
                if len(self.plans) == 1:
                    raise
            # Outside of the except block: the error's traceback keeps the tensors of the pass on the GPU.
            torch.cuda.empty_cache()
            plan, *self.plans = self.plans
            self.budget.exceeded(plan, self.plans[0], context.input_ids.shape[1], self.compiled)
            self.run = self.pass_of(self.plans[0])

    def _by_parts(self, memory: Tensor, context: Context, gradient: bool, recovered: bool) -> Pass:
        rows = self.plans[0].rows
        parts = zip(memory.split(rows), context.split(rows), strict=True)
        found = [self.run(part, few, gradient, recovered) for part, few in parts]
        if len(found) == 1:
            return found[0]
        return Pass._make(None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True))
