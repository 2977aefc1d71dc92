"""The PEFT tuner: a backbone with memory slots. WRITE, READ and the meta-gradient are in their own folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.lora import gate, write_phase
from gradmem_adapter.meta_gradients.tape import differentiable_write
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.outputs import Fidelity, WriteProgress
from gradmem_adapter.read.forward import check_forward_options, forward_with_memory, query_embeddings
from gradmem_adapter.read.generation import check_prompt, generate_with_memory
from gradmem_adapter.read.loss import outer_loss
from gradmem_adapter.read.prefix import memory_of_queries
from gradmem_adapter.read.prefix_cache import KeptPrefix, PrefixCache, prefix_key
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.backbone import check_backbone
from gradmem_adapter.utils.fingerprint import fingerprint, versions
from gradmem_adapter.utils.hardware import token_budget
from gradmem_adapter.utils.tokens import check_tokens
from gradmem_adapter.write.batching import progress_bar, token_ids, write_batches
from gradmem_adapter.write.context import Context, check_context, right_padded
from gradmem_adapter.write.fast import FastWrites
from gradmem_adapter.write.loop import warn_diverged, write_memory
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.optimizers import OPTIMIZERS
from gradmem_adapter.write.rates import Rate, write_lrs
from gradmem_adapter.write.start import start_memory

SLOTS = "memory_slots"
"""The name of the layer in the backbone. PEFT skips modules with the prefix in their name, so it is not in this one."""


class GradMemModel(BaseTuner):
    """A causal language model that writes contexts into memory and answers from it (GradMem, arXiv 2603.13875).

    Made by `get_peft_model(backbone, GradMemConfig(...))`; its methods are reached through the `PeftModel`.
    """

    peft_config: dict[str, GradMemConfig]  # type: ignore[assignment] # PEFT's own type, narrowed
    prefix = "gradmem_"
    uses_shared_state = True
    # LoRA layers belong to the adapter as the slots do: PEFT switches, deletes and freezes both by this class.
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    prefix_cache: PrefixCache
    """What `generate` keeps of the memory states it read last; `prefix_cache.max_bytes` bounds it, 0 turns it off."""

    # ---------------------------------------------------------------- PEFT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix_cache = PrefixCache()
        self._fast_writes = FastWrites()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("GradMem replaces no modules; it adds one.")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter's slots (and its LoRA) to the backbone. Called by PEFT."""
        check_backbone(model)
        config = self.peft_config[adapter_name]
        # First PEFT's own part, which freezes the backbone; the layers added after it stay trainable.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if config.lora_config is not None:
            self._inject_lora(model, adapter_name, config, low_cpu_mem_usage)
        if not hasattr(model, SLOTS):
            model.add_module(SLOTS, MemorySlots())
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            getattr(model, SLOTS).add(adapter_name, config, model)
        self.set_adapter(self.active_adapters, inference_mode=self._active_inference_mode())

    def _inject_lora(self, model: nn.Module, adapter: str, config: GradMemConfig, low_cpu_mem_usage: bool) -> None:
        """Put the nested LoRA's layers into the backbone with PEFT's own LoRA tuner."""
        lora_config = cast(LoraConfig, config.lora_config)
        lora_config.inference_mode = config.inference_mode
        outer = model.__dict__.pop("peft_config", None)  # or the LoRA tuner would take our configs for its own
        try:
            LoraModel(model, {adapter: lora_config}, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            model.__dict__.pop("peft_config", None)
            if outer is not None:
                model.__dict__["peft_config"] = outer
        if config.lora_phase != "both":
            for layer in model.modules():
                if isinstance(layer, LoraLayer) and adapter in layer._get_available_adapters():
                    gate(layer, adapter, config.lora_phase)

    def _active_inference_mode(self) -> bool:
        return all(self.peft_config[name].inference_mode for name in self.active_adapters)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one; the backbone is trainable where its config says `train_backbone`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if any(config.train_backbone for config in self.peft_config.values()):
            train = any(self.peft_config[name].train_backbone for name in self.active_adapters)
            for _, parameter in self.backbone_parameters():
                parameter.requires_grad_(train and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's slots and LoRA."""
        super().delete_adapter(adapter_name)
        # PEFT takes the new active adapter from the first layer it meets, which may be a LoRA the others do not have.
        self.set_adapter(self.slots.active_adapters, inference_mode=False)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not possible; raises `NotImplementedError`."""
        raise NotImplementedError(
            "A GradMem adapter cannot be merged into the backbone: memory is written per context, by gradients through "
            "the adapter's tensors. Use unload() for the backbone alone, or keep the adapter."
        )

    def unload(self) -> nn.Module:
        """Remove all adapters and return the backbone."""
        super().unload()
        delattr(self.model, SLOTS)
        return self.model

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters of all adapters: slots and LoRA layers, without what these wrap."""
        for layer_name, layer in self.model.named_modules():
            if isinstance(layer, BaseTunerLayer):  # a mixin of modules
                for name, child in cast(nn.Module, layer).named_children():
                    if name != "base_layer":
                        yield from child.named_parameters(prefix=f"{layer_name}.{name}")

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters of the backbone itself, under the names they have without an adapter."""
        adapters = {id(parameter) for _, parameter in self.adapter_parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in adapters:
                yield name.replace(".base_layer.", "."), parameter

    # ---------------------------------------------------------------- parts

    @property
    def slots(self) -> MemorySlots:
        """The layer that holds every trained tensor of the method."""
        return getattr(self.model, SLOTS)

    @property
    def _adapter(self) -> str:
        """The one active adapter."""
        if self.slots.disable_adapters:
            raise ValueError("The adapter is disabled: memory cannot be written or read inside disable_adapter().")
        active = self.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"Memory needs exactly one active adapter, and there are {len(active)}: {active}. Use "
                "set_adapter(name)."
            )
        return active[0]

    def _writer(self) -> Writer:
        return Writer(self.model, self.slots, self._adapter, self.peft_config[self._adapter])

    @property
    def prefix_length(self) -> int:
        """How many positions the memory takes with its control vectors, m + 2c."""
        return self._writer().prefix_length

    @property
    def positions(self) -> int | None:
        """How many positions the backbone has, None where it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _context(self, name: str, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        device = self.model.device
        check_tokens(name, input_ids, attention_mask, self.model)
        check_context(input_ids, attention_mask, self.prefix_length, self.positions)
        return right_padded(input_ids.to(device), None if attention_mask is None else attention_mask.to(device))

    def fingerprint(self) -> str:
        """The identity of the backbone and the active adapter; states carry it, and READ compares it."""
        adapter = self._adapter
        key = (adapter, versions(self.model))
        cached = self.__dict__.get("_fingerprint")
        if cached is None or cached[0] != key:
            own = [
                (f"{name}.".replace(f".{adapter}.", "."), parameter)
                for name, parameter in self.adapter_parameters()
                if f".{adapter}." in f"{name}."
            ]
            value = fingerprint(self.backbone_parameters(), own, self.peft_config[adapter])
            cached = self.__dict__["_fingerprint"] = (key, value)
        return cached[1]

    # ---------------------------------------------------------------- WRITE

    def write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        steps: int | None = None,
        lr: float | None = None,
        optimizer: str | None = None,
        initial: MemoryState | None = None,
        tolerance: float | None = None,
        stop_when_recovered: bool = False,
        last_loss: bool = True,
        callback: Callable[[WriteProgress], None] | None = None,
        compile: bool | Literal["auto"] = "auto",
        strict: bool = True,
        **ignored_tokenizer_outputs: Tensor,
    ) -> MemoryState:
        """WRITE a batch of contexts, each by itself, into one memory state each.

        Works under `torch.no_grad()` and `torch.inference_mode()`, changes nothing in the model, and may run in
        several threads at once.

        Args:
            input_ids: [B, N] token ids, as the tokenizer returns them.
            attention_mask: [B, N], 1 where a token counts; padding on either side. None: every token counts.
            steps: write steps, any number from 0 (the default is the config's `write_steps`).
            lr: write learning rate of every step (default: the learned ones, or the config's).
            optimizer: "sgd" or "adam" (default: the config's).
            initial: states to go on from, one per context, in place of the memory slots. Adam starts anew; of the
                first steps' learned rates the last is used.
            tolerance: a sample stops when a step lowers its loss by less than this share of it.
            stop_when_recovered: a sample stops when each of its tokens is the model's first choice.
            last_loss: False leaves the last of `write_losses` NaN and spares the forward pass that it takes, of
                2K + 1 passes in all; a last step that overshoots goes unseen then.
            callback: called with a `WriteProgress` before each step and after the last.
            compile: True: compile the model's layers for WRITE now, and launch each pass as a CUDA graph. False: do
                neither. "auto": on a GPU, graphs for shapes that come again, and compiled layers once WRITE has taken
                long enough for them to pay (docs/performance.md); on a CPU, neither. The states are the same up to
                rounding.
            strict: refuse an `initial` state that another model wrote.
            ignored_tokenizer_outputs: `token_type_ids` and the like, so that `**tokenizer(...)` can be passed.

        Returns:
            A `MemoryState` with B states, detached, in float32 (or float64) on the model's device.

        Raises:
            TypeError, ValueError: input that cannot be written; the message says why and what to do.
        """
        writer = self._writer()
        config = writer.config
        unknown = set(ignored_tokenizer_outputs) - {"token_type_ids", "special_tokens_mask", "length"}
        if unknown:
            raise TypeError(f"write() got unexpected arguments: {', '.join(sorted(unknown))}.")
        steps = config.write_steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an integer from 0, got {steps!r}.")
        if lr is not None and not 0 < lr < float("inf"):
            raise ValueError(f"lr must be a finite positive number, got {lr!r}.")
        if optimizer is not None and optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {tuple(OPTIMIZERS)}, got {optimizer!r}.")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and less than 1, got {tolerance!r}.")
        if not last_loss and tolerance is not None:
            raise ValueError("tolerance needs the loss after the last step: leave last_loss at True, or tolerance out.")
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {compile!r}.")
        context = self._context("input_ids", input_ids, attention_mask)
        batch = len(context.input_ids)
        if initial is not None:
            memory = self._checked_vectors(initial, strict)
            if len(memory) != batch:
                raise ValueError(f"initial has {len(memory)} states for {batch} contexts; pass one per context.")
        else:
            with torch.no_grad():
                memory = start_memory(writer, context)
        # On a memory that was written before, further steps are late ones.
        learned = write_lrs(
            self.slots, writer.adapter, config, steps, taken=0 if initial is None else config.num_write_lrs
        )
        lrs: Sequence[Rate] = learned.detach().unbind() if lr is None else [lr]
        longest = None if self.positions is None else self.positions - writer.prefix_length
        with self._fast_writes.of(writer, context, compile, longest) as run:
            memory, losses, diverged = write_memory(
                writer,
                memory.to(torch.promote_types(memory.dtype, torch.float32)),
                context,
                steps=steps,
                lrs=lrs,
                optimizer=optimizer or config.write_optimizer,
                tolerance=tolerance,
                stop_when_recovered=stop_when_recovered,
                last_loss=last_loss,
                callback=callback,
                run=run,
            )
            fingerprint = self.fingerprint()  # while a GPU is still at work
            warn_diverged(diverged)
        return MemoryState(memory, context.lengths, losses, fingerprint)

    def write_many(
        self,
        contexts: Sequence[Tensor | Sequence[int]],
        *,
        max_tokens: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> MemoryState:
        """WRITE any number of contexts of any lengths, in batches that fit into memory.

        Contexts of similar length are written together. Out of memory on a GPU, the batches are halved, with a
        warning. All contexts are checked before the first is written.

        Args:
            contexts: token ids [n] of each.
            max_tokens: a batch's tokens, padding counted (default: found from the device and its free memory).
            progress: show a progress bar; None: where stderr is a terminal.
            options: what `write` takes beside tokens and mask, but for `initial` and `callback`.

        Returns:
            A `MemoryState` with one state per context, in order, as `write` would return.

        Raises:
            TypeError, ValueError: input that cannot be written; the message names the context.
            torch.cuda.OutOfMemoryError: a single context does not fit; the message names it.
        """
        for name in ("initial", "callback"):
            if options.get(name) is not None:
                raise ValueError(f"write_many() cannot be combined with {name}, which is for one batch: use write().")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(f"max_tokens must be an integer from 1, got {max_tokens!r}.")
        rows = [token_ids(index, context, self.model.device) for index, context in enumerate(contexts)]
        if not rows:
            raise ValueError("There is no context to write.")
        for index, row in enumerate(rows):
            if row.dim() != 1:
                raise ValueError(f"Context {index} must be token ids of shape [n], got shape {tuple(row.shape)}.")
            try:
                self._context("input_ids", row[None], None)
            except (TypeError, ValueError) as error:
                message = str(error).replace("Context 0", "It").replace("input_ids", "It")
                raise type(error)(f"Context {index} of {len(rows)} cannot be written. {message}") from None
        budget = token_budget(self.model) if max_tokens is None else max_tokens
        with progress_bar(len(rows), progress) as done:
            states = write_batches(lambda ids, mask: self.write(ids, mask, **options), rows, budget, done)
        self._fast_writes.make_room(self.model.device)
        return states

    # ---------------------------------------------------------------- READ

    def prefix_embeddings(self, memory: MemoryState, *, strict: bool = True) -> Tensor:
        """What READ puts before the query: [B, m + 2c, d] input embeddings in the backbone's dtype.

        Any engine that takes input embeddings can be given them. `strict=False` reads states of another model, at
        the caller's own risk.
        """
        return self._prefix(self._checked_vectors(memory, strict))

    def _prefix(self, vectors: Tensor) -> Tensor:
        return self.slots.prefix(vectors, "read", self._adapter).to(self.model.get_input_embeddings().weight.dtype)

    def _checked_vectors(self, memory: MemoryState, strict: bool) -> Tensor:
        """The vectors [B, m, d] on the model's device, if the state is one this model can read."""
        if not isinstance(memory, MemoryState):
            raise TypeError(
                f"memory must be a MemoryState, as write() and MemoryState.load() return, got {type(memory).__name__}."
            )
        width = self.slots.gradmem_memory[self._adapter].shape[1]
        if memory.vectors.shape[2] != width:
            raise ValueError(
                f"The memory state has vectors of width {memory.vectors.shape[2]}, the model's are {width} wide: it "
                "was written by another model. Write the context again with this one."
            )
        if strict and memory.fingerprint != self.fingerprint():
            raise ValueError(
                f"The memory state was written by model {memory.fingerprint}, and this is model {self.fingerprint()} "
                "(backbone and adapter). Another model reads it as noise: write the context again with this one. "
                "strict=False reads it all the same, at your own risk."
            )
        return memory.vectors.to(self.model.device, self.slots.gradmem_memory[self._adapter].dtype)

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
        """READ, or WRITE and READ in one differentiable pass.

        Without `memory` and without a context this is the backbone (with its LoRA) on the query alone.

        Args:
            input_ids: [B, T] queries (with their targets, in training).
            attention_mask: [B, T], padding on either side.
            labels: [B, T], -100 where no loss counts. The first query token is predicted from the memory.
            memory: states to read, one for all queries or one per query.
            context_input_ids: [C, N] contexts that are written in this pass. With gradients enabled the outer loss
                flows back through the write steps as `meta_gradient` says.
            context_attention_mask: [C, N].
            context_index: [B], the context (or state) of each query, or [B, S], those that it reads side by side
                (as `MemoryState.concat` puts them); default: the same order.
            write_steps: K in this pass (default: the config's).
            max_targets: of a query at most so many labels count. Then the output head is applied where one does and
                nowhere else, which saves most of READ's memory; the output has no logits.
            strict: refuse a state that another model wrote.
            kwargs: what else the backbone's forward takes.

        Returns:
            `GradMemOutput` (the backbone's own output without memory): loss, and logits [B, T, V] of the query
            positions alone.
        """
        if memory is None and context_input_ids is None:
            if context_index is not None or context_attention_mask is not None:
                raise ValueError("context_index and context_attention_mask need a memory or context_input_ids.")
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs
            )
        if memory is not None and context_input_ids is not None:
            raise ValueError("Pass a memory to read or a context to write, not both.")
        check_forward_options(kwargs)
        query = query_embeddings(self.model, input_ids, inputs_embeds, attention_mask)
        losses = None
        if context_input_ids is not None:
            kwargs.setdefault("use_cache", False)  # a cache serves decoding, and whoever decodes writes first
            vectors, losses = self._write_on_tape(context_input_ids, context_attention_mask, write_steps)
        else:
            vectors = self._checked_vectors(cast(MemoryState, memory), strict)
        prefix = self._prefix(memory_of_queries(vectors, len(query), context_index))
        return_dict = kwargs.pop("return_dict", None)
        output = forward_with_memory(self.model, prefix, query, attention_mask, labels, max_targets, **kwargs)
        if losses is not None:
            output.memory, output.write_losses = vectors, losses
            if output.target_loss is not None:
                weight = self.peft_config[self._adapter].reconstruction_weight
                output.loss = outer_loss(output.target_loss, losses, weight)
        return output.to_tuple() if return_dict is False else output

    def _write_on_tape(
        self, input_ids: Tensor, attention_mask: Tensor | None, steps: int | None
    ) -> tuple[Tensor, Tensor]:
        """The memory [C, m, d] of contexts written in this pass, and the losses [C, K] before each step."""
        writer = self._writer()
        context = self._context("context_input_ids", input_ids, attention_mask)
        steps = writer.config.write_steps if steps is None else steps
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        lrs = write_lrs(self.slots, writer.adapter, writer.config, steps)
        start = start_memory(writer, context)
        return differentiable_write(writer, start, context, steps=steps, lrs=lrs, weights=weights)

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

        Args:
            inputs: [B, T] prompts (or `input_ids=`).
            memory: one state for all prompts or one per prompt; None: plain `generate` of the backbone.
            context_index: [B], the state of each prompt, or [B, S], those that it reads side by side.
            strict: refuse a state that another model wrote.
            kwargs: what Transformers' `generate` takes: `attention_mask`, sampling and beam options, `streamer`,
                `past_key_values` of an earlier turn (with the full sequence as prompt), ... Assisted decoding and
                chunked prefill are refused, because Transformers does them with prompts of tokens alone.

        Returns:
            What Transformers returns: prompts and new tokens [B, T + new]. `max_length` and `min_length` count
            both, as without memory.

        The keys and values of a state's prefix are kept for the next call with the same `MemoryState` object, as far
        as `prefix_cache.max_bytes` allows, unless prompts are padded on the left or `context_index` or another cache
        is passed. As after any change of shapes, logits then agree up to rounding.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if memory is None:
            if context_index is not None:
                raise ValueError("context_index needs a memory.")
            return self.model.generate(inputs, **kwargs)
        inputs = check_prompt(self.model, inputs, kwargs)
        with torch.no_grad():
            prefix = self._prefix(memory_of_queries(self._checked_vectors(memory, strict), len(inputs), context_index))
        kept = None
        if self.prefix_cache.max_bytes and context_index is None:
            kept = KeptPrefix(self.prefix_cache, memory, prefix_key(self.model, self._adapter))
        return generate_with_memory(self.model, inputs, prefix, kept, **kwargs)

    # ---------------------------------------------------------------- what was kept

    @torch.no_grad()
    def reconstruct(self, memory: MemoryState, max_new_tokens: int | None = None, *, strict: bool = True) -> Tensor:
        """Decode contexts greedily from memory alone, as WRITE sees it (its head, control vectors and LoRA).

        Args:
            max_new_tokens: how many tokens (default: those of the longest context).

        Returns:
            [B, max_new_tokens] token ids; those of sample i count up to `memory.context_tokens[i]`.
        """
        vectors, writer = self._checked_vectors(memory, strict), self._writer()
        length = int(memory.context_tokens.max()) if max_new_tokens is None else max_new_tokens
        embedding = self.model.get_input_embeddings()
        head = output_head(self.model, writer.slots.write_head(writer.adapter))
        tokens: list[Tensor] = []
        cache = None
        with write_phase():
            step = writer.slots.prefix(vectors, "write", writer.adapter).to(embedding.weight.dtype)
            for _ in range(length):
                output = self.model.base_model(
                    inputs_embeds=step, past_key_values=cache, use_cache=True, return_dict=True
                )
                cache = output.past_key_values
                tokens.append(head(output.last_hidden_state[:, -1:])[:, -1].argmax(-1))
                step = embedding(tokens[-1][:, None])
        return torch.stack(tokens, dim=1) if tokens else memory.context_tokens.new_zeros(len(memory), 0)

    @torch.no_grad()
    def fidelity(
        self,
        memory: MemoryState,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        strict: bool = True,
        **ignored_tokenizer_outputs: Tensor,
    ) -> Fidelity:
        """How much of each context its state gives back; see `Fidelity`.

        Args:
            memory: B states.
            input_ids: [B, N], the contexts; attention_mask: [B, N].
        """
        context = self._context("input_ids", input_ids, attention_mask)
        vectors = self._checked_vectors(memory, strict)
        if len(vectors) != len(context.input_ids):
            raise ValueError(f"There are {len(context.input_ids)} contexts for {len(vectors)} states; pass one each.")
        greedy = self.reconstruct(memory, context.input_ids.shape[1], strict=strict)
        same = ((greedy == context.input_ids) & context.mask).sum(1) / context.lengths
        _, recovered = self._writer().losses(vectors, context, recovered=True)
        assert recovered is not None  # for the type checker
        return Fidelity(greedy=same, teacher_forced=recovered)
