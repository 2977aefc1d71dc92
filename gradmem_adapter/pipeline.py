"""Texts in, texts out: a model with memory and its tokenizer in one object."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack, cast, overload

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.documents import DocumentMemory, Mode, sequential_segments, write_document
from gradmem_adapter.outputs import Fidelity, ScoredText, SurestAnswer, WriteProgress
from gradmem_adapter.prompts import Prompt, prompt_list, study_tokens
from gradmem_adapter.read.no_memory import generate_without_memory
from gradmem_adapter.read.reader import Reader
from gradmem_adapter.read.streaming import stream_text
from gradmem_adapter.sequential import write_sequential
from gradmem_adapter.state import MemoryState, check_state
from gradmem_adapter.support import StateSelector, answer_scores, surest
from gradmem_adapter.utils.tokens import check_no_file, text_list
from gradmem_adapter.write.options import WriteFields, WriteOptions


class GradMemPipeline(StateSelector):
    """Write texts into memory states and answer prompts from them. Several threads may share one pipeline.

    ```python
    pipeline = GradMemPipeline(*load_checkpoint(path))
    state = pipeline.write(["A long context.", "Another."])
    answers = pipeline.generate(["A question on the first?", "One on the second?"], memory=state)
    ```

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer, with a pad or an end token.
        reader (`Reader`, *optional*): what answers from memory, such as a reader of `gradmem_adapter.export`; None:
            `model` itself. Prompts without memory are answered by `model`'s backbone in any case.

    Raises:
        TypeError: `model` has no GradMem adapter.
        ValueError: the tokenizer has neither a pad nor an end token.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, reader: Reader | None = None) -> None:
        super().__init__(model, tokenizer)
        self.reader: Reader = self.model if reader is None else reader

    # ---------------------------------------------------------------- WRITE

    def write(
        self,
        texts: str | Sequence[str],
        *,
        options: WriteOptions | None = None,
        initial: MemoryState | None = None,
        callback: Callable[[WriteProgress], None] | None = None,
        strict: bool = True,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE each text into a memory state of its own, in one batch.

        Args:
            texts (`str` or `Sequence[str]`): one text or several.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
            initial (`MemoryState`, *optional*): states to continue from, one per text, in place of the memory slots.
            callback (`Callable`, *optional*): called with a `WriteProgress` before each step and after the last.
            strict (`bool`, *optional*, defaults to `True`): refuse an `initial` state that another model wrote.
            fields: individual fields of `WriteOptions`, overriding those of `options`: steps, lr, optimizer, tolerance,
                stop_when_recovered, last_loss, compile, objective, study, max_memory.

        Returns:
            `MemoryState`: one state per text, on the model's device.

        Raises:
            TypeError: something is not a text.
            ValueError: there is no text, or one has no tokens, is too long for the model or is the name of a file.
            MemoryError: there is not enough free memory.
        """
        options = self._with_study(WriteOptions.of(options, **fields))
        texts = text_list(texts, no_files=True)
        return self.model.write(
            *self.encode_contexts(texts), options=options, initial=initial, callback=callback, strict=strict
        )

    def write_many(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        progress: bool | None = None,
        done: Callable[[list[int], MemoryState], None] | None = None,
        callback: Callable[[list[int], WriteProgress], None] | None = None,
        options: WriteOptions | None = None,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE any number of texts of any lengths into one memory state each, in batches that fit into memory.

        Args:
            texts (`Sequence[str]`): the texts.
            max_tokens (`int`, *optional*): the most tokens in a batch, padding included; None: what the device has
                memory for.
            progress (`bool`, *optional*): show a progress bar; None: if stderr is a terminal.
            done (`Callable`, *optional*): called with the indices and states of each batch as soon as it is written.
            callback (`Callable`, *optional*): called with the indices of a batch and a `WriteProgress` before each step
                and after the last.
            options, fields: as for `write`.

        Returns:
            `MemoryState`: one state per text, in order.

        Raises:
            ValueError: there is no text, or one has no tokens, is too long for the model or is the name of a file; the
                message names it.
            MemoryError: there is not enough free memory for the longest text.
            torch.cuda.OutOfMemoryError: a single text does not fit; the message names it.
        """
        options = WriteOptions.of(options, **fields)
        texts = text_list(texts, no_files=True)
        return self._write_many(
            texts, max_tokens=max_tokens, progress=progress, done=done, callback=callback, options=options
        )

    def _write_many(self, texts: Sequence[str], *, options: WriteOptions, **how: Any) -> MemoryState:
        """Like `write_many`, but also writes texts that are the names of files."""
        return self.model.write_many(self._context_ids(texts), options=self._with_study(options), **how)

    def write_document(
        self,
        text: str | Iterable[str] | Iterable[int],
        mode: Mode = "parallel",
        *,
        segment_tokens: int | None = None,
        overlap: int | None = None,
        max_tokens: int | None = None,
        progress: bool | None = None,
        options: WriteOptions | None = None,
        **fields: Unpack[WriteFields],
    ) -> DocumentMemory:
        """WRITE a text of any length in segments, which end where paragraphs or sentences do.

        Args:
            text, segment_tokens, overlap: as for `segments`, but with `"sequential"`, segments have half the trained
                length and no overlap by default.
            mode (`str`, *optional*, defaults to `"parallel"`): `"parallel"`: a state for each segment. `"sequential"`:
                one state for all, into which segments are written one after another, each with what the state recites
                of those before; this takes no more device memory than writing a single segment.
            max_tokens, progress, options, fields: as for `write_many`; `max_tokens` only with `"parallel"`.

        Raises:
            TypeError, ValueError: a text that cannot be written or is the name of a file; an unknown mode; no
                `segment_tokens` although the adapter's configuration does not state its trained length.
        """
        check_no_file(text, ", which is read as it is needed")
        options = self._with_study(WriteOptions.of(options, **fields))
        return write_document(self, text, mode, segment_tokens, overlap, options, max_tokens, progress)

    def update(
        self,
        memory: MemoryState,
        text: str | Iterable[str] | Iterable[int],
        *,
        segment_tokens: int | None = None,
        options: WriteOptions | None = None,
        strict: bool = True,
        **fields: Unpack[WriteFields],
    ) -> MemoryState:
        """WRITE more text into a state, which keeps what it can recite of the earlier text.

        Args:
            memory (`MemoryState`): one state, left unchanged.
            text (`str`, `Iterable[str]` or `Iterable[int]`): a text of any length, as for `segments`.
            segment_tokens (`int`, *optional*): the most tokens to write at once; None: half the trained length.
            options, strict, fields: as for `write`.

        Returns:
            `MemoryState`: one state, of the same size as `memory`.

        Raises:
            TypeError, ValueError: a text that cannot be written or is the name of a file, or several states.
        """
        check_state("memory", memory)
        check_no_file(text, ", which is read as it is needed")
        options = WriteOptions.of(options, **fields)
        found = sequential_segments(self, text, segment_tokens, vectors=memory.num_memory_tokens)
        return write_sequential(self, found, options, memory, strict=strict)

    def _with_study(self, options: WriteOptions) -> WriteOptions:
        """With `objective="self_study"`, add the tokens with which the model is asked about a text."""
        if options.objective != "self_study" or options.study.requests:
            return options
        tokens = study_tokens(self.model.active_peft_config.query_format, self.tokenizer)
        return replace(options, study=replace(options.study, **tokens))

    def fidelity(self, texts: str | Sequence[str], memory: MemoryState) -> Fidelity:
        """How much of each text its state gives back.

        Args:
            texts (`str` or `Sequence[str]`): the texts that were written.
            memory (`MemoryState`): one state per text.
        """
        return self.model.fidelity(memory, *self.encode_contexts(texts))

    def reconstruct(self, memory: MemoryState) -> list[str]:
        """The text that greedy decoding recovers from each state alone.

        Args:
            memory (`MemoryState`): any number of states.
        """
        rows = zip(self.model.reconstruct(memory), memory.context_tokens.tolist(), strict=True)
        return [str(self.tokenizer.decode(ids[:length], skip_special_tokens=True)) for ids, length in rows]

    # ---------------------------------------------------------------- READ

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, memory: MemoryState | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, return_scores: Literal[False] = False, **options: Any,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, memory: MemoryState | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, return_scores: Literal[True], **options: Any,
    ) -> list[ScoredText]: ...  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        memory: MemoryState | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        return_scores: bool = False,
        **options: Any,
    ) -> list[str] | list[ScoredText]:
        """Answer prompts from memory, in one batch.

        Args:
            prompts (`str`, `list[dict]` or a list of either): one prompt or several; a prompt is a text, put into the
                adapter's `query_format`, or a list of chat messages, put into the tokenizer's chat template.
            memory (`MemoryState`, *optional*): one state for all prompts, or one per prompt; None: the backbone alone,
                without the adapter.
            chat_template_kwargs (`Mapping`, *optional*): arguments for the chat template, such as `enable_thinking`.
            return_scores (`bool`, *optional*, defaults to `False`): return with each answer a score from 0 to 1 for how
                well memory supports it. If the adapter was trained to refuse (`GradMemConfig.refusal`), this is the
                probability that it does not refuse the question; otherwise, the mean likelihood of the answer's tokens.
                `score_calibration` turns either into a calibrated probability. Takes one more pass.
            options: arguments of `model.generate`: `max_new_tokens`, `do_sample`, `stop_strings`, `context_index`, ...

        Returns:
            `list[str]`: the new text for each prompt, without the prompt; with `return_scores`, `list[ScoredText]`.

        Raises:
            ValueError: states that do not fit the prompts or the model; chat messages without a chat template; scores
                without memory; a prompt that has neither tokens nor memory.
        """
        if return_scores and memory is None:
            raise ValueError(
                "return_scores rates how well memory supports an answer, so it needs a memory. Pass memory=..., or "
                "leave it out."
            )
        batch = prompt_list(prompts)
        if not batch:
            return []
        input_ids, mask = self.encode_prompts(batch, chat_template_kwargs=chat_template_kwargs)
        output = self.generate_ids(input_ids, mask, memory=memory, **self.generation_options(options))
        new = (output if isinstance(output, Tensor) else output.sequences)[:, input_ids.shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        if memory is None or not return_scores:
            return texts
        scores = answer_scores(self, input_ids, mask, new, memory, options)
        return [ScoredText(text, score) for text, score in zip(texts, scores, strict=True)]

    def surest_answer(
        self, prompt: Prompt, *, memory: MemoryState, search_scores: Sequence[float] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, **options: Any,
    ) -> SurestAnswer:  # fmt: skip
        """Put the same prompt to each of several states, and return the answer of the state most likely to hold it.

        Meant for adapters that say when memory does not hold an answer (`GradMemConfig.refusal`): states that do not
        hold it score low, and only the best state answers. With other adapters, every state answers and the likeliest
        answer is returned; for these, reading the states side by side, as `select` does, is better.

        Args:
            prompt (`str` or `list[dict]`): a text or chat messages.
            memory (`MemoryState`): one state or several.
            search_scores, chat_template_kwargs, options: as for `select` and `generate`, which explains scores.

        Returns:
            `SurestAnswer`: the answer, its score, and the index of its state.
        """
        check_state("memory", memory)
        kwargs: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs}
        if not self.refuses:
            found = self.generate([prompt] * len(memory), memory=memory, return_scores=True, **kwargs, **options)
            each = len(found) // len(memory)
            searched = None if search_scores is None else [score for score in search_scores for _ in range(each)]
            best = surest([one.score for one in found], searched)
            return SurestAnswer(*found[best], state=best // each)
        how = {"search_scores": search_scores, "strict": options.get("strict", True)}
        read, (state,), score = self.select(prompt, memory=memory, support=True, **how, **kwargs)
        return SurestAnswer(self.generate(prompt, memory=read, **kwargs, **options)[0], cast(float, score), state)

    def stream(
        self,
        prompt: Prompt,
        *,
        memory: MemoryState | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generator[str, None, None]:
        """Answer one prompt from memory, piece by piece.

        An error in `generate` is raised here; closing the iterator stops generation.

        Args:
            prompt (`str` or `list[dict]`): a text or chat messages.
            memory (`MemoryState`, *optional*): one state; None: the backbone alone, without the adapter.
            chat_template_kwargs, options: as for `generate`.
        """
        ids, mask = self.encode_prompts([prompt], chat_template_kwargs=chat_template_kwargs)
        options = self.generation_options(options)
        yield from stream_text(self.generate_ids, self.tokenizer, ids, mask, memory=memory, **options)

    def generate_ids(
        self, input_ids: Tensor, attention_mask: Tensor, *, memory: MemoryState | None = None, **options: Any
    ) -> Any:
        """Transformers' `generate` from memory; without memory, that of the backbone, as if there were no adapter.

        (`model.generate` without memory follows PEFT: the adapter's LoRA acts.) Other threads see no change in the
        model.

        Args:
            input_ids (`Tensor`): `[B, T]`, prompts as `encode_prompts` returns them.
            attention_mask (`Tensor`): `[B, T]`.
            memory (`MemoryState`, *optional*): one state for all prompts, or one per prompt.
            options: arguments of `model.generate`, including those of `generation_options`.

        Returns:
            What Transformers returns: prompts and new tokens `[B, T + new]`.
        """
        if memory is None:
            backbone = cast(PreTrainedModel, self.model.get_base_model())
            return generate_without_memory(backbone, input_ids, attention_mask, **options)
        return self.reader.generate(input_ids=input_ids, attention_mask=attention_mask, memory=memory, **options)
