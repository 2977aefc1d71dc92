"""Batches calls that arrive at the same time, from threads or tasks."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import StoppingCriteria

from gradmem_adapter.answering.grammar import Constraint
from gradmem_adapter.answering.sampling import Sampling
from gradmem_adapter.answering.stopping import NewTokens
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.wording import counted

_WINDOW = 0.005
"""A batch begins when no call has arrived for this many seconds, or after ten times as long in any case."""


class Options(NamedTuple):
    """Options that all calls of a batch share. Their memories must have the same size as well."""

    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    grammar: str | None = None
    """The grammar that answers follow, see `grammar.py`."""


class Call:
    """One prompt that waits for its answer.

    Args:
        pipeline (`GradMemPipeline`): what answers.
        prompt (`list[int]`): the tokens of the prompt.
        memory (`MemoryState`, *optional*): one state.
        options (`Options`): how to answer; the number of new tokens is limited by the model's positions.
        seed (`int`, *optional*): seed for sampling.
        progress (`Callable`, *optional*): called from another thread after each new token, with all new tokens so far.

    Raises:
        ValueError: the model has no position left for an answer.
    """

    def __init__(
        self,
        pipeline: GradMemPipeline,
        prompt: list[int],
        memory: MemoryState | None,
        options: Options,
        seed: int | None,
        progress: Callable[[list[int]], None] = lambda tokens: None,
    ) -> None:
        vectors, positions = 0 if memory is None else memory.num_memory_tokens, pipeline.model.positions
        if positions is not None:
            if (room := positions - len(prompt) - vectors) < 1:
                raise ValueError(
                    f"The prompt is too long: it has {counted(len(prompt), 'token')} after "
                    f"{counted(vectors, 'memory vector')}, but the model has only {counted(positions, 'position')}. "
                    "Shorten it (in LangChain: trim_messages)."
                )
            options = options._replace(max_tokens=min(options.max_tokens, room))
        self.pipeline, self.prompt, self.memory, self.options, self.seed = pipeline, prompt, memory, options, seed
        self.draw = secrets.randbits(63) if seed is None else seed
        """The seed of its samples, drawn once: if its batch fails, a stream has already shown a part of the answer."""
        self.progress = progress
        self.tokens: Future[list[int]] = Future()
        """The new tokens."""
        self.cancelled = threading.Event()

    @property
    def kind(self) -> Hashable:
        """Equal for calls that can be in one batch."""
        return self.options, 0 if self.memory is None else self.memory.num_memory_tokens

    @property
    def by_engine(self) -> bool:
        """Whether an engine answers the call: engines batch and sample by themselves."""
        return self.memory is not None and self.pipeline.reader is not self.pipeline.model

    def generation_options(self, batch: Sequence[Call], criterion: StoppingCriteria) -> dict[str, Any]:
        """The arguments of `generate_ids` for a batch of calls of this kind."""
        unseeded = all(call.seed is None for call in batch)
        own, engine = self.options, self.by_engine and self.options.grammar is None and unseeded
        options = {"max_new_tokens": own.max_tokens, "do_sample": False, "stopping_criteria": [criterion]}
        if engine:
            return self.pipeline.generation_options(options | own.sampling.options())
        processors = own.sampling.processors([call.draw for call in batch], self.pipeline.model.device)
        if own.grammar is not None:
            processors.insert(0, Constraint(self.pipeline, own.grammar, len(batch)))
        return self.pipeline.generation_options(options | {"logits_processor": processors})

    def cancel(self) -> None:
        """Cancel the call: its answer ends with the next token, or does not begin."""
        self.cancelled.set()
        self.tokens.cancel()


class Batcher:
    """Answers calls to one pipeline, putting those that wait at the same time into one batch.

    The next batch gathers while the current one is being answered, so concurrent calls need no coordination.

    Args:
        begins (`Callable`, *optional*): called with the number of calls whenever a batch begins.
    """

    def __init__(self, begins: Callable[[int], None] = lambda size: None) -> None:
        self._begins = begins
        self._waiting: list[tuple[Call, int]] = []
        self._changed = threading.Condition()
        self._serving = False

    def submit(self, call: Call, max_batch: int) -> None:
        """Queue a call.

        Args:
            call (`Call`): its future `tokens` gets the answer or an exception.
            max_batch (`int`): the most calls in its batch.
        """
        with self._changed:
            if not self._serving:  # first, as it raises if no further thread can be started
                threading.Thread(target=self._serve, name="gradmem-batches", daemon=True).start()
                self._serving = True
            self._waiting.append((call, max_batch))
            self._changed.notify()

    def _serve(self) -> None:
        try:
            while batch := self._next():
                self._begins(len(batch))
                answer(batch)
        except BaseException as error:  # pass it to all waiting calls; the next call starts a new thread
            with self._changed:
                waiting, self._waiting, self._serving = self._waiting, [], False
            for call, _ in waiting:
                if call.tokens.set_running_or_notify_cancel():
                    call.tokens.set_exception(error)

    def _next(self) -> list[Call]:
        """The oldest call and those that can be answered with it. Empty if no call is waiting: the thread ends."""
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


def answer(batch: Sequence[Call]) -> None:
    """Answer calls of one kind together. If that fails, answer them one by one, so that each gets its answer or error.

    Args:
        batch (`Sequence[Call]`): calls, whose `tokens` are set. Cancelled calls are skipped.
    """
    batch = [call for call in batch if call.tokens.running() or call.tokens.set_running_or_notify_cancel()]
    if not batch:
        return
    try:
        rows = _generate(batch)
    except BaseException as error:
        if len(batch) == 1:
            batch[0].tokens.set_exception(error)
            return
        for call in batch:
            answer([call])
    else:
        for call, tokens in zip(batch, rows, strict=True):
            call.tokens.set_result(tokens)


def _generate(batch: Sequence[Call]) -> list[list[int]]:
    first, pipeline = batch[0], batch[0].pipeline
    ids, mask = pipeline.pad_prompts([call.prompt for call in batch])
    states = [call.memory for call in batch if call.memory is not None]
    new_tokens = NewTokens(
        pipeline.tokenizer,
        ids.shape[1],
        first.options.stops,
        [call.cancelled for call in batch],
        [call.progress for call in batch],
    )
    pipeline.generate_ids(
        ids,
        mask,
        memory=MemoryState.stack(states) if states else None,
        **first.generation_options(batch, new_tokens),
    )
    return [new_tokens.rows[i] for i in range(len(batch))]


_batchers: WeakKeyDictionary[GradMemPipeline, Batcher] = WeakKeyDictionary()
_making = threading.Lock()


def batcher_of(pipeline: GradMemPipeline) -> Batcher:
    """The batcher of a pipeline, shared by all chat models that use the pipeline."""
    with _making:
        return _batchers.setdefault(pipeline, Batcher())
