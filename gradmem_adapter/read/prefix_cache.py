"""Keys and values of prefixes that were read before, so that another query on the same state need not compute them."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.backbone import device_of
from gradmem_adapter.utils.fingerprint import Fingerprinted

Prefix = tuple[tuple[Tensor, Tensor], ...]
"""Per layer the keys and the values, `[B, heads, P, head size]` each."""


def prefix_key(backbone: PreTrainedModel, seen: Fingerprinted) -> Hashable:
    """What the keys and values of a prefix depend on besides the memory: weights, their devices, and autocast."""
    device = device_of(backbone).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return seen.key, autocast


class ReadCache(DynamicCache):
    """The KV cache of one `generate` on `[prefix; query]`: starts with the prefix, or copies the prefix when it is
    computed."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix | None, states: int, length: int, max_bytes: int) -> None:
        """Start with `prefix`, or start empty and copy the prefix when it is computed.

        Args:
            model (`PreTrainedModel`): the model that the cache is for.
            prefix (`Prefix`, *optional*): the keys and values to start with.
            states (`int`): B, the number of memory states; the rows of the first pass share them evenly and in order.
            length (`int`): P, the length of the prefix.
            max_bytes (`int`): a larger prefix is not copied.
        """
        super().__init__(config=model.config)
        self._states, self._length, self._max_bytes = states, length, max_bytes
        self._copied: dict[int, tuple[Tensor, Tensor]] = {}
        for i, (keys, values) in enumerate(prefix or ()):
            self._start_with(keys, values, i)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See Transformers; called once per layer and forward pass."""
        layer = cast(DynamicLayer, self.layers[layer_idx])  # see own_cache
        if not layer.is_initialized:
            self._copy(key_states, value_states, layer_idx)
        elif (rows := cast(Tensor, layer.keys).shape[0]) != len(key_states):
            # One state for all prompts, or several beams or samples of a prompt.
            layer.batch_repeat_interleave(len(key_states) // rows)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _start_with(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        """Like `update`, but without a copy if possible: keys and values are never modified in place."""
        layer = cast(DynamicLayer, self.layers[layer_idx])
        if type(layer) is DynamicLayer:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        else:  # a sliding window also counts what it has seen
            super().update(keys, values, layer_idx)

    def _copy(self, keys: Tensor, values: Tensor, layer: int) -> None:
        every = len(keys) // self._states  # prompts, beams and samples of a state have the same prefix
        keys, values = keys[::every, :, : self._length], values[::every, :, : self._length]
        nbytes = (keys.numel() + values.numel()) * keys.element_size()  # `nbytes` is not available in compiled layers
        if len(self.layers) * nbytes <= self._max_bytes:
            self._copied[layer] = keys.clone(), values.clone()

    def take_prefix(self) -> Prefix | None:
        """The copied prefix, only once. None: it is incomplete or too large, or the cache started with it."""
        copied, self._copied = self._copied, {}
        return tuple(copied[i] for i in range(len(copied))) if len(copied) == len(self.layers) else None


class _Entry(NamedTuple):
    state: weakref.ref[MemoryState]
    vectors: Tensor
    """A copy, because tensors can be changed in place."""
    key: Hashable
    prefix: Prefix

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.prefix)


class PrefixCache:
    """The prefixes of the memory states that were read most recently, at most `max_bytes` in total.

    An entry belongs to one state object, not to equal vectors, and is freed with it. Safe to use from several threads.
    Copies (`copy`, `pickle`) are empty.
    """

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        """Args: max_bytes (`int`, *optional*, defaults to 64 MiB): see the property."""
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        # Reentrant: the garbage collector may free a state and its entry while this thread holds the lock.
        self._lock = threading.RLock()
        self._max_bytes = max_bytes

    @property
    def max_bytes(self) -> int:
        """The most bytes to keep on the model's device; 0 turns the cache off."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._max_bytes = value
        self._shrink()

    @property
    def nbytes(self) -> int:
        """The bytes that are kept now."""
        return sum(entry.nbytes for entry in list(self._entries.values()))

    def __len__(self) -> int:
        """The number of `MemoryState` objects (each a batch) with an entry."""
        return len(self._entries)

    def __reduce__(self) -> tuple[type[PrefixCache], tuple[int]]:
        return PrefixCache, (self.max_bytes,)

    def get(self, state: MemoryState, key: Hashable) -> Prefix | None:
        """The prefix of a state, if the state is unchanged and the prefix was computed under the same `key`."""
        with self._lock:
            entry = self._entries.get(id(state))
            if entry is None or entry.state() is not state:
                return None
            self._entries.move_to_end(id(state))
        return entry.prefix if entry.key == key and torch.equal(entry.vectors, state.vectors) else None

    def put(self, state: MemoryState, key: Hashable, prefix: Prefix) -> None:
        """Keep a state's prefix. Its tensors must not be changed afterwards."""
        number, owner = id(state), weakref.ref(self)

        def forget(reference: weakref.ref[MemoryState]) -> None:
            cache = owner()
            if cache is not None:
                cache._forget(number, reference)

        entry = _Entry(weakref.ref(state, forget), state.vectors.detach().clone(), key, prefix)
        with self._lock:
            self._entries[number] = entry
            self._entries.move_to_end(number)
            self._shrink()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def _forget(self, number: int, reference: weakref.ref[MemoryState]) -> None:
        with self._lock:
            entry = self._entries.get(number)
            if entry is not None and entry.state is reference:  # the id may belong to a new state by now
                self._entries.pop(number, None)

    def _shrink(self) -> None:
        with self._lock:
            while self._entries and self.nbytes > self._max_bytes:
                self._entries.popitem(last=False)


class KeptPrefix(NamedTuple):
    """The entry of one state in a `PrefixCache`.

    Args:
        cache (`PrefixCache`): the cache.
        state (`MemoryState`): the state of the prefix, one for all rows or one per row.
        key (`Hashable`): see `prefix_key`.
        check (`Callable`, *optional*): raises if the computed prefix must not be kept.
    """

    cache: PrefixCache
    state: MemoryState
    key: Hashable
    check: Callable[[], None] = lambda: None

    def start(self, backbone: PreTrainedModel, length: int) -> ReadCache:
        """The KV cache for one `generate` after a prefix of `length` (P) positions: starts with the prefix, or copies
        it."""
        return ReadCache(backbone, self.cache.get(self.state, self.key), len(self.state), length, self.cache.max_bytes)

    def keep(self, cache: ReadCache) -> None:
        """Keep the prefix that a KV cache has copied."""
        self.check()
        if (computed := cache.take_prefix()) is not None:
            self.cache.put(self.state, self.key, computed)

    def fill(self, cache: StaticCache, rows: int) -> None:
        """Start a static cache of `rows` rows with the prefix, if it is kept."""
        for i, (keys, values) in enumerate(self.cache.get(self.state, self.key) or ()):
            each = rows // len(keys)
            cache.update(keys.repeat_interleave(each, dim=0), values.repeat_interleave(each, dim=0), i)

    def keep_first(self, cache: StaticCache, length: int) -> None:
        """Keep the prefix of `length` (P) positions at the start of a static cache, unless it is already kept."""
        self.check()
        layers = [cast(StaticLayer, layer) for layer in cache.layers]  # see can_capture
        if not all(layer.is_initialized for layer in layers) or self.cache.get(self.state, self.key) is not None:
            return
        pairs = [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in layers]
        each = len(pairs[0][0]) // len(self.state)
        found = [(keys[::each, :, :length], values[::each, :, :length]) for keys, values in pairs]
        if sum(keys.nbytes + values.nbytes for keys, values in found) <= self.cache.max_bytes:
            self.cache.put(self.state, self.key, tuple((keys.clone(), values.clone()) for keys, values in found))
