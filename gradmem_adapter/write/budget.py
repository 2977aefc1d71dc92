"""WRITE within the memory there is: the fastest plan that fits, and a more frugal one where it turns out not to."""

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
"""The largest factor that an estimate is corrected by: memory may have run out for another's sake."""
FRUGAL = 0.85
"""The share of what a plan takes that the next one may take, where memory has run out."""
MaxMemory: TypeAlias = int | Literal["auto"]
"""Bytes that contexts may take beside the model, or what the device has free."""


class Budget:
    """What WRITE of one model takes, as was seen of a few tokens, and corrected where that was too little.

    Args:
        backbone (`PreTrainedModel`): the causal LM, on its device and in its type. It may go before its budget.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        self._backbone = ref(backbone)
        self._footprints: dict[Hashable, Footprint] = {}
        self._correction = 1.0  # a factor
        self._said = False

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Budget:
        """The budget of a causal LM, one for as long as it lives."""
        return _budgets.setdefault(backbone, cls(backbone))

    def bytes(self, plan: Plan, length: int, compiled: bool = False) -> float:
        """About how many bytes a plan takes for contexts of `length` tokens each."""
        return self._correction * self._footprint().bytes(plan, length, compiled)

    def plans(self, batch: int, length: int, max_memory: MaxMemory, compiled: bool = False) -> list[Plan]:
        """The fastest plan that fits, and more frugal ones, each by a good part.

        Args:
            batch (`int`): how many contexts.
            length (`int`): tokens of the longest.
            max_memory (`int` or `"auto"`): as in `WriteOptions`.
            compiled (`bool`, *optional*, defaults to `False`): the layers are compiled.

        Raises:
            MemoryError: none fits. On a CPU the system would end the process without a word.
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
                f"To write {'a context' if batch == 1 else 'one context after the other'} of {length:,} tokens takes "
                f"about {needed[least] / 1e9:.2g} GB at least, and {room / 1e9:.2g} GB are "
                f"{'free' if max_memory == 'auto' else 'allowed'}. GradMemPipeline.write_document (or gradmem write "
                "--store) writes a long text in segments; in bfloat16 a model needs half."
            )
        return found if found[-1] == least else [*found, least]

    def exceeded(self, plan: Plan, following: Plan, length: int, compiled: bool = False) -> None:
        """Learn that a plan did not fit into what is free, where the following one may just do, and say so once."""
        footprint = self._footprint()
        seen = free_memory(footprint.device) / footprint.bytes(following, length, compiled)
        self._correction = max(self._correction, min(seen, MOST_CORRECTED))
        if not self._said:
            self._said = True
            warnings.warn(
                f"Out of memory in WRITE with {plan}: going on with {following}. max_memory sets a bound that is kept "
                "from the start.",
                RuntimeWarning,
                stacklevel=2,
            )

    def tokens(self, max_memory: MaxMemory = "auto") -> int:
        """How many padded tokens to write at once: at least 1, at most what saturates the device."""
        device = self._footprint().device
        share = SHARE_OF_FREE_MEMORY.get(device.type, SHARE_OF_FREE_MEMORY["cpu"])
        room = share * free_memory(device) if max_memory == "auto" else max_memory
        most = SATURATED.get(device.type, SATURATED["cpu"])
        each = self.bytes(Plan(most), 1) / most  # with a token's part of the logits, of which few are held
        return max(1, min(int(room / each), most))

    def _footprint(self) -> Footprint:
        backbone = self._backbone()
        if backbone is None:
            raise ReferenceError("The model that this budget was of is gone.")
        device = device_of(backbone)
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        key = device, backbone.dtype, backbone.config._attn_implementation, backbone.training, autocast
        if key not in self._footprints:
            self._footprints[key] = Footprint.of(backbone)
        return self._footprints[key]


_budgets: WeakKeyDictionary[PreTrainedModel, Budget] = WeakKeyDictionary()


class BoundedPass:
    """A `RunPass` that goes by a plan, and by the next one where memory does not suffice.

    Args:
        budget (`Budget`): of the model.
        plans (`list[Plan]`): the one to go by, and the more frugal ones.
        pass_of (`Callable`): the pass for a plan; it is given the plan's rows at most.
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
            # Only here, as the traceback of the error holds what the pass had on the GPU.
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
