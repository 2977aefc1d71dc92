"""The model: a backbone that writes and reads memory. Its methods check their input and delegate: WRITE, READ and the
meta-gradient have folders of their own, the writing half is in `writing`, PEFT's life cycle in `tuner`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from gradmem_adapter.meta_gradients.tape import differentiable_write
from gradmem_adapter.ops.answers import check_answers
from gradmem_adapter.probe import probe
from gradmem_adapter.read.cache_memory import tie_caches
from gradmem_adapter.read.forward import check_forward_options, check_known, forward_with_memory, query_embeddings
from gradmem_adapter.read.generation import check_prompt, generate_with_memory
from gradmem_adapter.read.likelihood import log_likelihood
from gradmem_adapter.read.loss import outer_loss
from gradmem_adapter.read.prefix import memory_of_queries
from gradmem_adapter.read.prefix_cache import KeptPrefix, PrefixCache, prefix_key
from gradmem_adapter.state import MemoryState
from gradmem_adapter.tuner import of_one_adapter
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.tokens import as_long
from gradmem_adapter.write.context import Context
from gradmem_adapter.writing import WritingModel


class GradMemModel(WritingModel):
    """A causal language model that writes contexts into memory and answers from it (GradMem, arXiv 2603.13875).

    Create it with `get_peft_model(backbone, GradMemConfig(...))`, and call its methods on the `PeftModel`. In shapes, B
    is the number of samples, N of context tokens, T of query tokens, m of memory vectors and c of control vectors; d is
    the embedding size.

    Attributes:
        prefix_cache (`PrefixCache`): what `generate` keeps of the memory states it read last. `prefix_cache.max_bytes`
            limits its size; 0 turns it off.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix_cache = PrefixCache()

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the backbone after testing the backbone. Called by PEFT."""
        config = self.peft_config[adapter_name]
        if config.probe_backbone and not config.inference_mode:
            probe(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

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

        Without `memory` and without a context, this runs the backbone (with its LoRA) on the query alone.

        Args:
            input_ids (`Tensor`, *optional*): `[B, T]` queries, followed in training by their targets.
            attention_mask (`Tensor`, *optional*): `[B, T]`, padding on either side.
            inputs_embeds (`Tensor`, *optional*): `[B, T, d]`, in place of `input_ids`.
            labels (`Tensor`, *optional*): `[B, T]`, -100 at positions that do not count. The first query token is
                predicted from the memory.
            memory (`MemoryState`, *optional*): states to read, one for all queries or one per query.
            context_input_ids (`Tensor`, *optional*): `[C, N]` contexts to write in this pass. With gradients enabled,
                the outer loss is backpropagated through the write steps as `meta_gradient` says.
            context_attention_mask (`Tensor`, *optional*): `[C, N]`.
            context_index (`Tensor`, *optional*): `[B]`, the index of each query's context (or state), or `[B, S]`, of
                those that it reads side by side (as in `MemoryState.concat`). `None`: in the same order.
            write_steps (`int`, *optional*): K in this pass, 0 or more. `None`: the configuration's.
            max_targets (`int`, *optional*): the most labels that count in any query. The output head is then applied
                only where a label counts, which saves most of READ's memory; the output has no logits.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.
            kwargs: other arguments of the backbone's forward.

        Returns:
            `GradMemOutput` (without memory, the backbone's own output): the loss, and logits `[B, T, V]` of the query
            positions only. `logits_to_keep`, hidden states and attentions also refer to these positions only.

        Raises:
            TypeError, ValueError: inputs that do not fit together, or that the model cannot read.
        """
        input_ids, labels = as_long(input_ids), as_long(labels)
        if write_steps is not None and context_input_ids is None:
            raise ValueError(
                "write_steps applies to a context that is written in this pass. Pass context_input_ids, or leave "
                "write_steps out."
            )
        if memory is None and context_input_ids is None:
            if any(given is not None for given in (context_index, context_attention_mask, max_targets)):
                raise ValueError(
                    "context_index, context_attention_mask and max_targets need a memory or context_input_ids. Pass "
                    "one, or leave them out."
                )
            check_known(kwargs, self.model)
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs
            )
        if memory is not None and context_input_ids is not None:
            raise ValueError("Pass a memory to read or a context to write, not both.")
        query = query_embeddings(self.model, input_ids, inputs_embeds, attention_mask)
        check_forward_options(kwargs, query)
        check_known(kwargs, self.model)
        losses = None
        if context_input_ids is not None:
            kwargs.setdefault("use_cache", False)  # a cache is for decoding, where contexts are written beforehand
            context = Context.from_tokens(
                context_input_ids, context_attention_mask, self.model, self.prefix_length, "context_input_ids"
            )
            weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            vectors, losses = differentiable_write(self._writer, context, write_steps, weights)
        else:
            vectors = self._vectors(cast(MemoryState, memory), strict)
        read = memory_of_queries(vectors, len(query), context_index)
        return_dict = kwargs.pop("return_dict", None)
        output = forward_with_memory(
            self.model, self._prefix(read), query, attention_mask, labels, max_targets, **kwargs
        )
        tie_caches(output, read)
        if losses is not None:
            output.memory, output.write_losses = vectors, losses
            if output.target_loss is not None:
                weight = self.peft_config[self._adapter].reconstruction_weight
                output.loss = outer_loss(output.target_loss, losses, weight)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        memory: MemoryState | None = None,
        context_index: Tensor | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `generate`, reading from memory.

        The keys and values of a state's prefix are kept for the next call with the same `MemoryState` object, within
        `prefix_cache.max_bytes`, unless prompts are padded on the left, or `context_index` or another cache is passed.
        As after any change of shapes, logits then agree up to rounding.

        Args:
            inputs (`Tensor`): `[B, T]` prompts (or `input_ids=`). Right padding is moved to the left.
            generation_config (`GenerationConfig`, *optional*): as in Transformers.
            memory (`MemoryState`, *optional*): one state for all prompts or one per prompt. `None`: plain `generate` of
                the backbone (with its LoRA).
            context_index (`Tensor`, *optional*): `[B]`, the index of each prompt's state, or `[B, S]`, of those it
                reads side by side.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote, and a cache that
                was made with another memory.
            kwargs: other arguments of Transformers' `generate`: `attention_mask`, sampling and beam options,
                `streamer`, `past_key_values` of an earlier turn with the same memory (and the full sequence as prompt),
                ... On a GPU, `cache_implementation="static"` decodes several times as fast (docs/performance.md).

        Returns:
            What Transformers returns: prompts and new tokens `[B, T + new]`. `max_length` and `min_length` count both.

        Raises:
            NotImplementedError: assisted decoding, chunked prefill or any other way of decoding that Transformers
                offers only for prompts of tokens.
            TypeError, ValueError: a prompt or a state that the model cannot read, or a cache of another memory.
        """
        inputs = as_long(kwargs.pop("input_ids", None) if inputs is None else inputs)
        wanted = "a GenerationConfig (pass a mask as attention_mask=)"
        check_kind("generation_config", generation_config, GenerationConfig | None, wanted)
        kwargs["generation_config"] = generation_config
        if memory is None:
            if context_index is not None:
                raise ValueError("context_index needs a memory. Pass memory=..., or leave context_index out.")
            tie_caches(kwargs, None, strict)
            with self._unchanged():
                return self.model.generate(inputs, **kwargs)
        inputs = check_prompt(self.model, inputs, kwargs)
        keeps = self.prefix_cache.max_bytes > 0 and context_index is None
        with self._unchanged() as check:
            seen = self._fingerprinted() if strict or keeps else None
            with torch.no_grad():
                read = memory_of_queries(self._vectors(memory, strict, seen), len(inputs), context_index)
                prefix = self._prefix(read)
            tie_caches(kwargs, read, strict)
            kept = None
            if seen is not None and keeps:
                kept = KeptPrefix(self.prefix_cache, memory, prefix_key(self.model, seen), check)
            output = generate_with_memory(self.model, inputs, prefix, kept, **kwargs)
        if not isinstance(output, Tensor):
            tie_caches(output, read)
        return output

    def generate_batch(self, *args: Any, memory: MemoryState | None = None, **kwargs: Any) -> Any:
        """Run Transformers' `generate_batch` on the backbone (with its LoRA). It reads no memory and ignores arguments
        that it does not know.

        Raises:
            NotImplementedError: a memory is passed.
        """
        if memory is not None:
            raise NotImplementedError(
                "generate_batch supports only prompts of token ids, but memory consists of input embeddings. Use "
                "generate(memory=...), which takes a batch of prompts with one state for all or one per prompt."
            )
        return self.model.generate_batch(*args, **kwargs)

    def query_prefix(
        self, memory: MemoryState, queries: int, *, context_index: Tensor | None = None, strict: bool = True
    ) -> Tensor:
        """What READ puts before each query; `prefix_embeddings` returns the same for each state.

        Args:
            memory (`MemoryState`): one state for all queries or one per query.
            queries (`int`): B, the number of queries.
            context_index (`Tensor`, *optional*): as for `generate`.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.

        Returns:
            `Tensor`: `[B, m + 2c, d]` input embeddings in the backbone's dtype, with k m vectors for k states side by
            side.
        """
        return self._prefix(memory_of_queries(self._vectors(memory, strict), queries, context_index))

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
        """Mean log-likelihood of the tokens of each answer, given its query and memory (see `read/likelihood.py`).

        Args:
            queries, answers (`Sequence`): B rows of token ids each; an answer is what follows its query.
            memory (`MemoryState`): one state for all queries or one per query.
            context_index (`Tensor`, *optional*): as for `generate`.
            strict (`bool`, *optional*, defaults to `True`): refuse a state that another model wrote.

        Returns:
            `Tensor`: `[B]`, nats per token.

        Raises:
            TypeError, ValueError: no queries, an empty answer, a state or tokens that the model cannot read, or more
                tokens than it has positions for.
        """
        with torch.no_grad():
            prefix = self.query_prefix(memory, len(queries), context_index=context_index, strict=strict)
        check_answers(self.model, prefix.shape[1], queries, answers)
        return log_likelihood(self.model, prefix, queries, answers)
