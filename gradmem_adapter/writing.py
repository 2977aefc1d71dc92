"""The writing half of the model: WRITE, and what can be decoded from memory alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, SupportsIndex, Unpack

import torch
from torch import Tensor

from gradmem_adapter.outputs import Fidelity, WriteProgress
from gradmem_adapter.state import MemoryState, check_readable, check_state
from gradmem_adapter.tuner import GradMemTuner, of_one_adapter
from gradmem_adapter.utils.backbone import device_of
from gradmem_adapter.utils.fingerprint import Fingerprinted
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.parameters import parts_with_dropout
from gradmem_adapter.utils.tokens import check_token_types
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.batching import check_rows, progress_bar, write_batches
from gradmem_adapter.write.budget import BoundedPass, Budget
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.fast import FastWrites
from gradmem_adapter.write.fidelity import fidelity, reconstruct
from gradmem_adapter.write.loop import warn_diverged, write_contexts
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.options import WriteFields, WriteOptions
from gradmem_adapter.write.self_study import study_contexts
from gradmem_adapter.write.update import start_update

WORSE = 2
"""A state of more tokens than this many segments answers questions much worse: a general adapter's F1 fell from 66 to
55 with twice the tokens (docs/long_texts.md)."""


class WritingModel(GradMemTuner):
    """WRITE, and methods that need only memory. `GradMemModel` adds READ; its docstring explains the letters in
    shapes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fast_writes = FastWrites()

    @property
    def _writer(self) -> Writer:
        return Writer(self.model, self.slots, self._adapter, self.peft_config[self._adapter])

    def _vectors(self, memory: MemoryState, strict: bool, seen: Fingerprinted | None = None) -> Tensor:
        """The vectors `[B, m, d]` on the model's device, if this model can read them; `seen` is the current
        fingerprint."""
        slots = self.slots.gradmem_memory[self._adapter]
        own = (self._fingerprinted() if seen is None else seen).fingerprint if strict else None
        check_readable(memory, slots.shape[1], own)
        return memory.vectors.to(device_of(self.model), torch.promote_types(slots.dtype, torch.float32))

    def _prefix(self, vectors: Tensor) -> Tensor:
        return self.slots.prefix(vectors, "read", self._adapter).to(self.model.get_input_embeddings().weight.dtype)

    def write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        options: WriteOptions | None = None,
        initial: MemoryState | None = None,
        callback: Callable[[WriteProgress], None] | None = None,
        strict: bool = True,
        token_type_ids: Tensor | None = None,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE each context of a batch, by itself, into a memory state of its own:

            M_{k+1} = M_k - a * grad_M L_w(M_k; C),    k = 0 .. K-1    (GradMem, arXiv 2603.13875)

        Works under `torch.no_grad()` and `torch.inference_mode()`, changes nothing in the model, and may run in several
        threads at once.

        Args:
            input_ids (`Tensor`): `[B, N]` token ids, as the tokenizer returns them.
            attention_mask (`Tensor`, *optional*): `[B, N]`, 1 where a token counts; padding on either side. `None`:
                every token counts.
            options (`WriteOptions`, *optional*): how to write. `None`: as the configuration says.
            initial (`MemoryState`, *optional*): states to continue from, one per context, in place of the memory slots.
                The write optimizer starts afresh; of the learned rates per step, only the last is used.
            callback (`Callable`, *optional*): called with a `WriteProgress` before each step and after the last.
            strict (`bool`, *optional*, defaults to `True`): refuse an `initial` state that another model wrote.
            token_type_ids (`Tensor`, *optional*): must be zeros; accepted so that `**tokenizer(...)` can be passed.
            fields: individual fields of `WriteOptions`, overriding those of `options`: steps, lr, optimizer, tolerance,
                stop_when_recovered, last_loss, compile, objective, study, max_memory.

        Returns:
            `MemoryState`: B states, detached, in float32 (or float64) on the model's device.

        Raises:
            TypeError, ValueError: input that cannot be written; the message says why and what to do.
            MemoryError: there is not enough free memory.
        """
        options = WriteOptions.of(options, **fields)
        check_token_types(token_type_ids)
        context = self._contexts_behind(initial, input_ids, attention_mask)
        if initial is not None:
            self._check_rates(initial, options)
        self._check_conditions(context.input_ids.shape[1])
        return self._write(context, options, initial, callback, strict)

    def _contexts_behind(self, memory: MemoryState | None, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        """Checked contexts, which fit after the memory; `None`: after the adapter's slots."""
        taken = self.prefix_length
        if memory is not None:
            check_state("memory", memory)
            taken = self._writer.prefix_length(memory.num_memory_tokens)
        return Context.from_tokens(input_ids, attention_mask, self.model, taken)

    def _check_rates(self, memory: MemoryState, options: WriteOptions) -> None:
        """Raise if states have vectors without a learned write learning rate."""
        config, vectors = self.peft_config[self._adapter], memory.num_memory_tokens
        steps = config.write_steps if options.steps is None else options.steps
        own = options.objective == "reconstruction" and options.lr is None and steps > 0
        if own and config.learn_write_lr == "per_element" and vectors != config.num_memory_tokens:
            raise ValueError(
                f"The state has {counted(vectors, 'vector')}, but the adapter has learned write learning rates for "
                f"memories of {config.num_memory_tokens}. Continue from single states and put them side by side "
                "afterwards, or pass lr."
            )

    def _check_conditions(self, length: int) -> None:
        """Warn about contexts that are longer than the adapter was trained for, and about dropout."""
        dropping = parts_with_dropout(self.model) if self.training else ()
        name = next((name for name, module in dropping if module.training), None)
        if name is not None:
            warnings.warn(
                f"The model is in training mode, and {name!r} has dropout, so memory is noisy and differs each time. "
                "Call model.eval() first, also after get_peft_model and trainer.train().",
                stacklevel=3,
            )
        config = self.peft_config[self._adapter]
        trained, segment = config.trained_length, config.segment_tokens
        if trained is None or segment is None:
            return
        if length > trained:
            found = f"the adapter was trained on up to {trained:,} in one state, so longer contexts are kept less well"
        elif config.refusal is not None and length > WORSE * segment:  # adapters for other tasks may know their texts
            found = f"questions are answered best from states of up to {segment:,} and much worse from longer ones"
        else:
            return
        warnings.warn(
            f"A context has {length:,} tokens, and {found}. Write a long text in segments with "
            "GradMemPipeline.write_document (or gradmem write --store).",
            stacklevel=3,
        )

    @of_one_adapter
    def _write(
        self,
        context: Context,
        options: WriteOptions,
        initial: MemoryState | None = None,
        callback: Callable[[WriteProgress], None] | None = None,
        strict: bool = True,
        more: bool = False,
    ) -> MemoryState:
        writer = self._writer
        start = None if initial is None else self._vectors(initial, strict)
        if start is not None and len(start) != len(context.input_ids):
            raise ValueError(
                f"initial has {counted(len(start), 'state')} for {counted(len(context.input_ids), 'context')}. Pass "
                "one state for each context."
            )
        if options.objective == "self_study":
            memory, losses, diverged = study_contexts(writer, context, options, start, callback)
            fingerprint = self.fingerprint()
            warn_diverged(diverged)
            return MemoryState(memory, context.lengths, losses, fingerprint)
        batch, length = context.input_ids.shape
        budget = Budget.of(self.model)
        compiled = options.compile is True
        plans = budget.plans(batch, length, options.max_memory, compiled)
        vectors = writer.config.num_memory_tokens if start is None else start.shape[1]
        with self._fast_writes.of(writer, context, vectors, options.compile) as pass_of:
            run = BoundedPass(budget, plans, pass_of, compiled)
            written = write_contexts(writer, context, options, start, callback, run, more, plans[0].rows)
            memory, losses, diverged = written
            fingerprint = self.fingerprint()  # while the GPU is still busy
            warn_diverged(diverged)
        return MemoryState(memory, context.lengths, losses, fingerprint)

    @of_one_adapter
    def update(
        self,
        memory: MemoryState,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        options: WriteOptions | None = None,
        strict: bool = True,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE more text into states, which keep what they can of the earlier text (see `write/update.py`).

        Args:
            memory (`MemoryState`): B states, left unchanged.
            input_ids (`Tensor`): `[B, N]`, the text to add to each.
            attention_mask (`Tensor`, *optional*): `[B, N]`, padding on either side.
            options (`WriteOptions`, *optional*): how to write. `None`: as the configuration says.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            fields: as for `write`.

        Returns:
            `MemoryState`: B states. Their `context_tokens` count old and new tokens; `write_losses` are those of the
            new text.

        Raises:
            ValueError: `objective="self_study"`, which writes each text by itself; otherwise as for `write`.
        """
        options = WriteOptions.of(options, **fields)
        if options.objective == "self_study":
            raise ValueError(
                "objective='self_study' writes each text into a state of its own. Write the new text separately, and "
                "join both states with MemoryState.concat."
            )
        context = self._contexts_behind(memory, input_ids, attention_mask)
        vectors = self._vectors(memory, strict)
        _check_one_each(context, "text", vectors)
        self._check_rates(memory, options)
        known, config = memory.context_tokens.to(context.lengths.device), self.peft_config[self._adapter]
        if config.start != "slots" and memory.num_memory_tokens != config.num_memory_tokens:
            raise ValueError(
                f"The state has {counted(memory.num_memory_tokens, 'vector')}, but with start={config.start!r} text is "
                f"written into {config.num_memory_tokens}. Update single states, and put them side by side afterwards."
            )
        with torch.no_grad():
            start, whole = start_update(self._writer, vectors, known, context, config.trained_length)
        self._check_conditions(whole.input_ids.shape[1])
        begun = MemoryState(start, known, memory.write_losses, memory.fingerprint)
        written = self._write(whole, options, begun, strict=strict, more=True)
        return MemoryState(written.vectors, known + context.lengths, written.write_losses, written.fingerprint)

    def longest_update(self, vectors: int) -> int | None:
        """The most tokens that a text for `update` may have, whatever a state recites; None: any number.

        Args:
            vectors (`int`): m of the state.
        """
        return self._writer.longest_update(vectors)

    def write_many(
        self,
        contexts: Sequence[Tensor | Sequence[int]],
        *,
        max_tokens: int | None = None,
        progress: bool | None = None,
        done: Callable[[list[int], MemoryState], None] | None = None,
        callback: Callable[[list[int], WriteProgress], None] | None = None,
        options: WriteOptions | None = None,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE any number of contexts of any lengths, in batches that fit into memory.

        Contexts of similar length are written together. All are checked before the first is written.

        Args:
            contexts (`Sequence`): the token ids `[n]` of each context.
            max_tokens (`int`, *optional*): the most tokens in a batch, padding included. `None`: found from the device
                and its free memory.
            progress (`bool`, *optional*): show a progress bar. `None`: if stderr is a terminal.
            done (`Callable`, *optional*): called with the indices and states of each batch as soon as it is written, so
                that a later failure loses nothing.
            callback (`Callable`, *optional*): called with the indices of a batch and a `WriteProgress` before each step
                and after the last.
            options, fields: as for `write`.

        Returns:
            `MemoryState`: one state per context, in order, as `write` would return.

        Raises:
            TypeError, ValueError: input that cannot be written; the message names the context.
            MemoryError: there is not enough free memory for the longest context.
            torch.cuda.OutOfMemoryError: a single context does not fit; the message names it.
        """
        options = WriteOptions.of(options, **fields)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(f"max_tokens must be a positive integer, got {max_tokens!r}.")
        rows = check_rows(contexts, self.model, self.prefix_length)
        longest, budget = max(map(len, rows)), Budget.of(self.model)
        self._check_conditions(longest)
        if options.objective == "reconstruction":
            budget.plans(1, longest, options.max_memory, options.compile is True)  # raises before anything is written
        size = budget.tokens(options.max_memory) if max_tokens is None else max_tokens

        def write(indices: list[int], ids: Tensor, mask: Tensor) -> MemoryState:
            context = Context.from_tokens(ids, mask, self.model, self.prefix_length)
            told = None if callback is None else partial(callback, indices)
            return self._write(context, options, callback=told)

        with progress_bar(len(rows), progress) as advance:

            def written(indices: list[int], states: MemoryState) -> None:
                advance(len(indices))
                if done is not None:
                    done(indices, states)

            return write_batches(write, rows, size, written)

    def prefix_embeddings(self, memory: MemoryState, *, strict: bool = True) -> Tensor:
        """What READ puts before the query, for any engine that takes input embeddings.

        Args:
            memory (`MemoryState`): B states.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote; `False` reads it
                at the caller's own risk.

        Returns:
            `Tensor`: `[B, m + 2c, d]` input embeddings in the backbone's dtype.
        """
        return self._prefix(self._vectors(memory, strict)).clone()  # engines may change it in place

    @of_one_adapter
    def reconstruct(
        self,
        memory: MemoryState,
        max_new_tokens: int | None = None,
        *,
        strict: bool = True,
        callback: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Decode contexts greedily from memory alone, as WRITE sees it (with its head, control vectors and LoRA).

        Args:
            memory (`MemoryState`): B states.
            max_new_tokens (`int`, *optional*): how many tokens to decode. `None`: as many as the longest context has,
                as far as the backbone has positions.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            callback (`Callable`, *optional*): called with the token ids `[B]` of each position as soon as they are
                decoded.

        Returns:
            `Tensor`: `[B, max_new_tokens]` token ids, of which the first `memory.context_tokens[i]` of sample i count.

        Raises:
            ValueError: a negative number of tokens, more than the backbone has positions for after the memory, or a
                state that leaves no position.
        """
        vectors = self._vectors(memory, strict)
        most = self._writer.longest_context(memory.num_memory_tokens)
        if most is not None and most < 1:
            raise ValueError(
                f"The state has {counted(memory.num_memory_tokens, 'vector')}, but the model has only {self.positions} "
                "positions, so none is left for a token. Reconstruct states one by one."
            )
        if max_new_tokens is None:
            longest = int(memory.context_tokens.max())
            max_new_tokens = longest if most is None else min(longest, most)
        check_kind("max_new_tokens", max_new_tokens, SupportsIndex, "a number of tokens")
        if max_new_tokens < 0 or (most is not None and max_new_tokens > most):
            allowed = "at least 0" if most is None else f"between 0 and {most}, the positions that memory leaves"
            raise ValueError(f"max_new_tokens must be {allowed}; got {max_new_tokens}.")
        return reconstruct(self._writer, vectors, max_new_tokens, callback)

    @of_one_adapter
    def fidelity(
        self,
        memory: MemoryState,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        strict: bool = True,
        token_type_ids: Tensor | None = None,
    ) -> Fidelity:
        """How much of each context its state gives back.

        Args:
            memory (`MemoryState`): B states.
            input_ids (`Tensor`): `[B, N]`, the contexts.
            attention_mask (`Tensor`, *optional*): `[B, N]`, padding on either side.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            token_type_ids (`Tensor`, *optional*): must be zeros; accepted so that `**tokenizer(...)` can be passed.

        Returns:
            `Fidelity`: the shares `[B]` of tokens that come back, decoded greedily and given the true tokens before
            them.
        """
        check_token_types(token_type_ids)
        context = self._contexts_behind(memory, input_ids, attention_mask)
        vectors = self._vectors(memory, strict)
        _check_one_each(context, "context", vectors)
        return fidelity(self._writer, vectors, context)


def _check_one_each(context: Context, noun: str, vectors: Tensor) -> None:
    if len(context.input_ids) != len(vectors):
        raise ValueError(
            f"Got {counted(len(context.input_ids), noun)} for {counted(len(vectors), 'state')}. Pass one for each "
            "state."
        )
