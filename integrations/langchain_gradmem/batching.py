"""Calls that come at the same time, from threads or tasks, go through the model together."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import StoppingCriteria

from gradmem_adapter import GradMemPipeline, MemoryState

from .sampling import Sampling
from .stopping import NewTokens
from .structured import Constraint

_WINDOW = 0.005
"""Seconds without a further call after which a batch begins. It begins after ten of them in any case."""


class Options(NamedTuple):
    """What calls must have in common to be one batch, besides the size of their memories."""

    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    grammar: str | None = None
    """What answers keep to, see `structured`."""

    def generate(
        self, pipeline: GradMemPipeline, seeds: Sequence[int | None], criterion: StoppingCriteria
    ) -> dict[str, Any]:
        """Options of the pipeline's `generate_ids` for rows with these seeds."""
        processors = self.sampling.processors(seeds, pipeline.model.device)
        if self.grammar is not None:
            processors.insert(0, Constraint(pipeline, self.grammar, len(seeds)))
        options = {"max_new_tokens": self.max_tokens, "do_sample": False, "logits_processor": processors}
        return pipeline.generation_options(options | {"stopping_criteria": [criterion]})


class Call:
    """One prompt that waits for its answer.

    Args:
        pipeline (`GradMemPipeline`): who answers.
        prompt (`list[int]`): its tokens.
        memory (`MemoryState`, *optional*): one state.
        options (`Options`): how to answer.
        seed (`int`, *optional*): of sampling.
    """

    def __init__(
        self,
        pipeline: GradMemPipeline,
        prompt: list[int],
        memory: MemoryState | None,
        options: Options,
        seed: int | None,
    ) -> None:
        self.pipeline, self.prompt, self.memory, self.options, self.seed = pipeline, prompt, memory, options, seed
        self.tokens: Future[list[int]] = Future()
        """The new tokens."""
        self.cancelled = threading.Event()

    @property
    def kind(self) -> Hashable:
        """The same for calls that can be one batch."""
        return self.options, 0 if self.memory is None else self.memory.num_memory_tokens

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends with its next token, or does not begin."""
        self.cancelled.set()
        self.tokens.cancel()


class Batcher:
    """Answers calls to one pipeline, those that wait at the same time in one batch.

    While a batch is answered the next one gathers, so that concurrent calls are batches without being told.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Call, int]] = []
        self._changed = threading.Condition()
        self._serving = False

    def submit(self, call: Call, max_batch: int) -> None:
        """Have a call answered.

        Args:
            call (`Call`): its `tokens` are set, or raise, when it is.
            max_batch (`int`): most calls in its batch.
        """
        with self._changed:
            if not self._serving:  # first, for it fails where there can be no further thread
                threading.Thread(target=self._serve, name="gradmem-batches", daemon=True).start()
                self._serving = True
            self._waiting.append((call, max_batch))
            self._changed.notify()

    def _serve(self) -> None:
        try:
            while batch := self._next():
                self._answer(batch)
        except BaseException as error:  # who waits must learn of it, and the next call gets a new thread
            with self._changed:
                waiting, self._waiting, self._serving = self._waiting, [], False
            for call, _ in waiting:
                if call.tokens.set_running_or_notify_cancel():
                    call.tokens.set_exception(error)

    def _next(self) -> list[Call]:
        """The oldest call and those that can be answered with it; none: nothing waits, and the thread ends."""
        with self._changed:
            end = time.monotonic() + 10 * _WINDOW
            while self._waiting and len(self._waiting) < self._waiting[0][1] and time.monotonic() < end:
                if not self._changed.wait(_WINDOW):
                    break
            self._waiting = [entry for entry in self._waiting if not entry[0].cancelled.is_set()]
            if not self._waiting:
                self._serving = False
                return []
            oldest, size = self._waiting[0]
            batch = [entry for entry in self._waiting if entry[0].kind == oldest.kind][:size]
            self._waiting = [entry for entry in self._waiting if entry not in batch]
        return [call for call, _ in batch]

    def _answer(self, batch: list[Call]) -> None:
        batch = [call for call in batch if call.tokens.running() or call.tokens.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            rows = self._generate(batch)
        except BaseException as error:
            if len(batch) == 1:
                batch[0].tokens.set_exception(error)
                return
            for call in batch:  # one by one, so that each has its own error or answer
                self._answer([call])
        else:
            for call, tokens in zip(batch, rows, strict=True):
                call.tokens.set_result(tokens)

    @staticmethod
    def _generate(batch: list[Call]) -> list[list[int]]:
        pipeline, options = batch[0].pipeline, batch[0].options
        ids, mask = pipeline.pad_prompts([call.prompt for call in batch])
        states = [call.memory for call in batch if call.memory is not None]
        new_tokens = NewTokens(pipeline.tokenizer, ids.shape[1], options.stops, [call.cancelled for call in batch])
        pipeline.generate_ids(
            ids,
            mask,
            memory=MemoryState.stack(states) if states else None,
            **options.generate(pipeline, [call.seed for call in batch], new_tokens),
        )
        return [new_tokens.rows[i] for i in range(len(batch))]


_batchers: WeakKeyDictionary[GradMemPipeline, Batcher] = WeakKeyDictionary()
_making = threading.Lock()


def batcher_of(pipeline: GradMemPipeline) -> Batcher:
    """The one that answers all calls to a pipeline, whichever chat model they come from."""
    with _making:
        return _batchers.setdefault(pipeline, Batcher())
