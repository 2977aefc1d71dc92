"""Calls that come at the same time, from threads or tasks, go through the model together."""

from __future__ import annotations

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
"""Seconds without a further call after which a batch begins. It begins after ten of them in any case."""


class Options(NamedTuple):
    """What calls must have in common to be one batch, besides the size of their memories."""

    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    grammar: str | None = None
    """What answers keep to, see `grammar`."""


class Call:
    """One prompt that waits for its answer.

    Args:
        pipeline (`GradMemPipeline`): who answers.
        prompt (`list[int]`): its tokens.
        memory (`MemoryState`, *optional*): one state.
        options (`Options`): how to answer; no more tokens are given than the model has positions for.
        seed (`int`, *optional*): of sampling.
        progress (`Callable`, *optional*): given the new tokens so far whenever there is one more, by another thread.

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
                    f"The prompt is too long: it has {counted(len(prompt), 'token')}, memory "
                    f"{counted(vectors, 'vector')} before it, and the model has {counted(positions, 'position')}. "
                    "Shorten it (in LangChain: trim_messages)."
                )
            options = options._replace(max_tokens=min(options.max_tokens, room))
        self.pipeline, self.prompt, self.memory, self.options, self.seed = pipeline, prompt, memory, options, seed
        self.progress = progress
        self.tokens: Future[list[int]] = Future()
        """The new tokens."""
        self.cancelled = threading.Event()

    @property
    def kind(self) -> Hashable:
        """The same for calls that can be one batch."""
        return self.options, 0 if self.memory is None else self.memory.num_memory_tokens

    @property
    def by_engine(self) -> bool:
        """Whether an engine answers it, which makes batches and draws tokens by itself."""
        return self.memory is not None and self.pipeline.reader is not self.pipeline.model

    def generation_options(self, seeds: Sequence[int | None], criterion: StoppingCriteria) -> dict[str, Any]:
        """What `generate_ids` is given for a batch of calls of this kind.

        Args:
            seeds (`Sequence[int]`): of each row.
            criterion (`StoppingCriteria`): what ends rows.
        """
        own, engine = self.options, self.by_engine and self.options.grammar is None and set(seeds) <= {None}
        options = {"max_new_tokens": own.max_tokens, "do_sample": False, "stopping_criteria": [criterion]}
        if engine:
            return self.pipeline.generation_options(options | own.sampling.options())
        processors = own.sampling.processors(seeds, self.pipeline.model.device)
        if own.grammar is not None:
            processors.insert(0, Constraint(self.pipeline, own.grammar, len(seeds)))
        return self.pipeline.generation_options(options | {"logits_processor": processors})

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends with its next token, or does not begin."""
        self.cancelled.set()
        self.tokens.cancel()


class Batcher:
    """Answers calls to one pipeline, those that wait at the same time in one batch.

    While a batch is answered the next one gathers, so that concurrent calls are batches without being told.

    Args:
        begins (`Callable`, *optional*): given the number of calls of each batch that begins.
    """

    def __init__(self, begins: Callable[[int], None] = lambda size: None) -> None:
        self._begins = begins
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
                self._begins(len(batch))
                answer(batch)
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


def answer(batch: Sequence[Call]) -> None:
    """Answer calls of one kind together, and one by one where that fails, so that each has its own error or answer.

    Args:
        batch (`Sequence[Call]`): whose `tokens` are set; those that were cancelled are left out.
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
        **first.generation_options([call.seed for call in batch], new_tokens),
    )
    return [new_tokens.rows[i] for i in range(len(batch))]


_batchers: WeakKeyDictionary[GradMemPipeline, Batcher] = WeakKeyDictionary()
_making = threading.Lock()


def batcher_of(pipeline: GradMemPipeline) -> Batcher:
    """The one that answers all calls to a pipeline, whichever chat model they come from."""
    with _making:
        return _batchers.setdefault(pipeline, Batcher())
