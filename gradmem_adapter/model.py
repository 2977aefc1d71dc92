"""The model: a backbone that writes and reads memory. Its methods check and delegate; WRITE, READ and the meta-gradient
are in their own folders, PEFT's life cycle is in `tuner`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gradmem_adapter.meta_gradients.tape import differentiable_write
from gradmem_adapter.outputs import Fidelity, WriteProgress
from gradmem_adapter.probe import probe
from gradmem_adapter.read.forward import check_forward_options, forward_with_memory, query_embeddings
from gradmem_adapter.read.generation import check_prompt, generate_with_memory
from gradmem_adapter.read.likelihood import log_likelihood
from gradmem_adapter.read.loss import outer_loss
from gradmem_adapter.read.prefix import memory_of_queries
from gradmem_adapter.read.prefix_cache import KeptPrefix, PrefixCache, prefix_key
from gradmem_adapter.state import MemoryState, check_readable
from gradmem_adapter.tuner import GradMemTuner, of_one_adapter
from gradmem_adapter.utils.backbone import device_of
from gradmem_adapter.utils.hardware import token_budget
from gradmem_adapter.utils.tokens import as_long, check_token_types
from gradmem_adapter.write.batching import check_rows, progress_bar, write_batches
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.fast import FastWrites
from gradmem_adapter.write.fidelity import fidelity, reconstruct
from gradmem_adapter.write.loop import warn_diverged, write_contexts
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.options import WriteFields, WriteOptions
from gradmem_adapter.write.self_study import study_contexts

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradMemModel(GradMemTuner):
    """A causal language model that writes contexts into memory and answers from it (GradMem, arXiv 2603.13875).

    Made by `get_peft_model(backbone, GradMemConfig(...))`; its methods are reached through the `PeftModel`. Below, B
    are samples, N context tokens, T query tokens, m memory vectors, c control vectors, d the embedding size.

    Attributes:
        prefix_cache (`PrefixCache`): what `generate` keeps of the memory states it read last; `prefix_cache.max_bytes`
            bounds it, 0 turns it off.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix_cache = PrefixCache()
        self._fast_writes = FastWrites()

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the backbone, once this was tried out. Called by PEFT."""
        config = self.peft_config[adapter_name]
        if config.probe and not config.inference_mode:
            probe(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @property
    def _writer(self) -> Writer:
        return Writer(self.model, self.slots, self._adapter, self.peft_config[self._adapter])

    def _vectors(self, memory: MemoryState, strict: bool) -> Tensor:
        """The vectors `[B, m, d]` on the model's device, if this model can read them."""
        slots = self.slots.gradmem_memory[self._adapter]
        check_readable(memory, slots.shape[1], self.fingerprint() if strict else None)
        return memory.vectors.to(device_of(self.model), torch.promote_types(slots.dtype, torch.float32))

    def _prefix(self, vectors: Tensor) -> Tensor:
        return self.slots.prefix(vectors, "read", self._adapter).to(self.model.get_input_embeddings().weight.dtype)

    # ---------------------------------------------------------------- WRITE

    @of_one_adapter
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
        """WRITE a batch of contexts, each by itself, into one memory state each:

            M_{k+1} = M_k - a * grad_M L_w(M_k; C),    k = 0 .. K-1    (GradMem, arXiv 2603.13875)

        Works under `torch.no_grad()` and `torch.inference_mode()`, changes nothing in the model, and may run in
        several threads at once.

        Args:
            input_ids (`Tensor`): `[B, N]` token ids, as the tokenizer returns them.
            attention_mask (`Tensor`, *optional*): `[B, N]`, 1 where a token counts; padding on either side. `None`:
                every token counts.
            options (`WriteOptions`, *optional*): how to write. `None`: as the configuration says.
            initial (`MemoryState`, *optional*): states to go on from, one per context, in place of the memory slots.
                The write optimizer starts anew; of the first steps' learned rates the last is used.
            callback (`Callable`, *optional*): called with a `WriteProgress` before each step and after the last.
            strict (`bool`, *optional*, defaults to `True`): refuse an `initial` state that another model wrote.
            token_type_ids (`Tensor`, *optional*): zeros, so that `**tokenizer(...)` can be passed.
            fields: steps, lr, optimizer, tolerance, stop_when_recovered, last_loss, compile, objective, study, the
                fields of `WriteOptions` by themselves, in place of those of `options`.

        Returns:
            `MemoryState`: B states, detached, in float32 (or float64) on the model's device.

        Raises:
            TypeError, ValueError: input that cannot be written; the message says why and what to do.
        """
        options = WriteOptions.of(options, **fields)
        check_token_types(token_type_ids)
        writer = self._writer
        context = Context.from_tokens(input_ids, attention_mask, self.model, self.prefix_length)
        start = None if initial is None else self._vectors(initial, strict)
        if start is not None and len(start) != len(context.input_ids):
            raise ValueError(
                f"initial has {len(start)} states for {len(context.input_ids)} contexts; pass one per context."
            )
        if options.objective == "self_study":
            memory, losses, diverged = study_contexts(writer, context, options, start, callback)
            fingerprint = self.fingerprint()
            warn_diverged(diverged)
            return MemoryState(memory, context.lengths, losses, fingerprint)
        with self._fast_writes.of(writer, context, options.compile) as run:
            memory, losses, diverged = write_contexts(writer, context, options, start, callback, run)
            fingerprint = self.fingerprint()  # while a GPU is still at work
            warn_diverged(diverged)
        return MemoryState(memory, context.lengths, losses, fingerprint)

    def write_many(
        self,
        contexts: Sequence[Tensor | Sequence[int]],
        *,
        max_tokens: int | None = None,
        progress: bool | None = None,
        done: Callable[[list[int], MemoryState], None] | None = None,
        options: WriteOptions | None = None,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE any number of contexts of any lengths, in batches that fit into memory.

        Contexts of similar length are written together. Out of memory on a GPU, the batches are halved, with a
        warning. All contexts are checked before the first is written.

        Args:
            contexts (`Sequence`): token ids `[n]` of each.
            max_tokens (`int`, *optional*): a batch's tokens, padding counted. `None`: found from the device and its
                free memory.
            progress (`bool`, *optional*): show a progress bar. `None`: where stderr is a terminal.
            done (`Callable`, *optional*): given the indices and the states of each batch as soon as it is written, so
                that what fails later loses nothing.
            options, fields: as for `write`.

        Returns:
            `MemoryState`: one state per context, in order, as `write` would return.

        Raises:
            TypeError, ValueError: input that cannot be written; the message names the context.
            torch.cuda.OutOfMemoryError: a single context does not fit; the message names it.
        """
        options = WriteOptions.of(options, **fields)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(f"max_tokens must be an integer from 1, got {max_tokens!r}.")
        rows = check_rows(contexts, self.model, self.prefix_length)
        budget = token_budget(self.model) if max_tokens is None else max_tokens
        with progress_bar(len(rows), progress) as advance:

            def written(indices: list[int], states: MemoryState) -> None:
                advance(len(indices))
                if done is not None:
                    done(indices, states)

            states = write_batches(lambda ids, mask: self.write(ids, mask, options=options), rows, budget, written)
        self._fast_writes.make_room(device_of(self.model))
        return states

    # ---------------------------------------------------------------- READ

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
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        memory: MemoryState | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        context_index: Tensor | None = None,
        write_steps: int | None = None,
        max_targets: int | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """READ, p(y | [M_K; query]), or WRITE and READ in one differentiable pass.

        Without `memory` and without a context this is the backbone (with its LoRA) on the query alone.

        Args:
            input_ids (`Tensor`, *optional*): `[B, T]` queries (with their targets, in training).
            attention_mask (`Tensor`, *optional*): `[B, T]`, padding on either side.
            inputs_embeds (`Tensor`, *optional*): `[B, T, d]`, in place of `input_ids`.
            labels (`Tensor`, *optional*): `[B, T]`, -100 where no loss counts. The first query token is predicted from
                the memory.
            memory (`MemoryState`, *optional*): states to read, one for all queries or one per query.
            context_input_ids (`Tensor`, *optional*): `[C, N]` contexts that are written in this pass. With gradients
                enabled the outer loss flows back through the write steps as `meta_gradient` says.
            context_attention_mask (`Tensor`, *optional*): `[C, N]`.
            context_index (`Tensor`, *optional*): `[B]`, the context (or state) of each query, or `[B, S]`, those that
                it reads side by side (as `MemoryState.concat` puts them). `None`: the same order.
            write_steps (`int`, *optional*): K in this pass. `None`: the configuration's.
            max_targets (`int`, *optional*): of a query at most so many labels count. Then the output head is applied
                where one does and nowhere else, which saves most of READ's memory; the output has no logits.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            kwargs: what else the backbone's forward takes.

        Returns:
            `GradMemOutput` (the backbone's own output without memory): loss, and logits `[B, T, V]` of the query
            positions alone.

        Raises:
            TypeError, ValueError: inputs that do not go together, or that the model cannot read.
        """
        input_ids, labels = as_long(input_ids), as_long(labels)
        if memory is None and context_input_ids is None:
            if context_index is not None or context_attention_mask is not None:
                raise ValueError("context_index and context_attention_mask need a memory or context_input_ids.")
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs
            )
        if memory is not None and context_input_ids is not None:
            raise ValueError("Pass a memory to read or a context to write, not both.")
        query = query_embeddings(self.model, input_ids, inputs_embeds, attention_mask)
        check_forward_options(kwargs, query)
        losses = None
        if context_input_ids is not None:
            kwargs.setdefault("use_cache", False)  # a cache serves decoding, and whoever decodes writes first
            context = Context.from_tokens(
                context_input_ids, context_attention_mask, self.model, self.prefix_length, "context_input_ids"
            )
            weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            vectors, losses = differentiable_write(self._writer, context, write_steps, weights)
        else:
            vectors = self._vectors(cast(MemoryState, memory), strict)
        prefix = self._prefix(memory_of_queries(vectors, len(query), context_index))
        return_dict = kwargs.pop("return_dict", None)
        output = forward_with_memory(self.model, prefix, query, attention_mask, labels, max_targets, **kwargs)
        if losses is not None:
            output.memory, output.write_losses = vectors, losses
            if output.target_loss is not None:
                weight = self.peft_config[self._adapter].reconstruction_weight
                output.loss = outer_loss(output.target_loss, losses, weight)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        memory: MemoryState | None = None,
        context_index: Tensor | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `generate`, reading from memory.

        The keys and values of a state's prefix are kept for the next call with the same `MemoryState` object, as far
        as `prefix_cache.max_bytes` allows, unless prompts are padded on the left or `context_index` or another cache
        is passed. As after any change of shapes, logits then agree up to rounding.

        Args:
            inputs (`Tensor`): `[B, T]` prompts (or `input_ids=`). Padding on the right is moved to the left.
            memory (`MemoryState`, *optional*): one state for all prompts or one per prompt. `None`: plain `generate`
                of the backbone (with its LoRA).
            context_index (`Tensor`, *optional*): `[B]`, the state of each prompt, or `[B, S]`, those read side by side.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            kwargs: what Transformers' `generate` takes: `attention_mask`, sampling and beam options, `streamer`,
                `past_key_values` of an earlier turn (with the full sequence as prompt), ...

        Returns:
            What Transformers returns: prompts and new tokens `[B, T + new]`. `max_length` and `min_length` count both.

        Raises:
            NotImplementedError: assisted decoding or chunked prefill, which Transformers does for tokens alone.
            TypeError, ValueError: a prompt or a state that the model cannot read.
        """
        inputs = as_long(kwargs.pop("input_ids", None) if inputs is None else inputs)
        if memory is None:
            if context_index is not None:
                raise ValueError("context_index needs a memory.")
            with self._unchanged():
                return self.model.generate(inputs, **kwargs)
        inputs = check_prompt(self.model, inputs, kwargs)
        with self._unchanged() as check:
            with torch.no_grad():
                prefix = self._prefix(memory_of_queries(self._vectors(memory, strict), len(inputs), context_index))
            kept = None
            if self.prefix_cache.max_bytes and context_index is None:
                key = prefix_key(self.model, self._adapter, self.fingerprint())
                kept = KeptPrefix(self.prefix_cache, memory, key, check)
            return generate_with_memory(self.model, inputs, prefix, kept, **kwargs)

    @of_one_adapter
    def log_likelihood(
        self,
        queries: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        memory: MemoryState,
        *,
        context_index: Tensor | None = None,
        strict: bool = True,
    ) -> Tensor:
        """How likely answers are from memory: the mean log-likelihood of their tokens, see `read/likelihood.py`.

        Args:
            queries, answers (`Sequence`): B rows of token ids, an answer being what follows its query.
            memory (`MemoryState`): one state for all queries or one per query.
            context_index (`Tensor`, *optional*): as for `generate`.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.

        Returns:
            `Tensor`: `[B]`, nats a token.
        """
        with torch.no_grad():
            prefix = self._prefix(memory_of_queries(self._vectors(memory, strict), len(queries), context_index))
        return log_likelihood(self.model, prefix, queries, answers)

    # ---------------------------------------------------------------- what was kept

    @of_one_adapter
    def reconstruct(self, memory: MemoryState, max_new_tokens: int | None = None, *, strict: bool = True) -> Tensor:
        """Decode contexts greedily from memory alone, as WRITE sees it (its head, control vectors and LoRA).

        Args:
            memory (`MemoryState`): B states.
            max_new_tokens (`int`, *optional*): how many tokens. `None`: those of the longest context.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.

        Returns:
            `Tensor`: `[B, max_new_tokens]` token ids; those of sample i count up to `memory.context_tokens[i]`.
        """
        length = int(memory.context_tokens.max()) if max_new_tokens is None else max_new_tokens
        return reconstruct(self._writer, self._vectors(memory, strict), length)

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
            token_type_ids (`Tensor`, *optional*): zeros, so that `**tokenizer(...)` can be passed.

        Returns:
            `Fidelity`: shares `[B]` of tokens that come back, decoded greedily and given the true tokens before them.
        """
        check_token_types(token_type_ids)
        context = Context.from_tokens(input_ids, attention_mask, self.model, self.prefix_length)
        vectors = self._vectors(memory, strict)
        if len(vectors) != len(context.input_ids):
            raise ValueError(f"There are {len(context.input_ids)} contexts for {len(vectors)} states; pass one each.")
        return fidelity(self._writer, vectors, context)
