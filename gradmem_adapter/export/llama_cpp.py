"""READ by llama.cpp, through `llama-cpp-python`."""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from peft import PeftModel
from torch import Tensor

from gradmem_adapter.export.engine import EnginePrompt, EngineReader, EngineSampling, lock_of
from gradmem_adapter.peft_model import GradMemPeftModel

if TYPE_CHECKING:
    from llama_cpp import Llama


class LlamaCppReader(EngineReader):
    """Answers from memory with llama.cpp, one prompt after another, token by token.

    Args:
        model (`PeftModel`): the model with the adapter that writes the states.
        llama (`Llama`): a `Llama` with the `model.gguf` that `gradmem export --gguf float32` made. Its `n_batch` must
            be at least the number of vectors before a prompt, and its `n_ctx` must hold these, the prompt and the
            answer.
        check_model (`bool`, *optional*, defaults to `True`): before the first answer, check that llama.cpp's model is
            the adapter's own.
    """

    def __init__(self, model: PeftModel | GradMemPeftModel, llama: Llama, *, check_model: bool = True) -> None:
        super().__init__(model, check_model=check_model)
        self.llama = llama

    def _answers(
        self, prompts: Sequence[EnginePrompt], sampling: EngineSampling
    ) -> Generator[tuple[int, list[int], bool], None, None]:
        llama = self.llama
        for i, prompt in enumerate(prompts):
            needed = len(prompt.prefix) + len(prompt.tokens) + sampling.max_new_tokens
            if needed > llama.n_ctx() or len(prompt.prefix) > llama.n_batch:
                raise ValueError(
                    f"Memory, prompt and answer need {needed} positions, {len(prompt.prefix)} of them for memory, but "
                    f"the Llama has n_ctx={llama.n_ctx()} and n_batch={llama.n_batch}. Create it with larger ones."
                )
            with lock_of(llama):
                read_prefix(llama, prompt.prefix)
                tokens = prompt.tokens
                for count in range(1, sampling.max_new_tokens + 1):
                    llama.eval(tokens)
                    tokens = [
                        llama.sample(temp=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=0.0)
                    ]
                    last = tokens[0] in sampling.stop_token_ids or count == sampling.max_new_tokens
                    yield i, tokens, last
                    if last:
                        break


def read_prefix(llama: Llama, prefix: Tensor) -> None:
    """Make a `Llama` read input embeddings `[P, d]` as the first positions of a new sequence."""
    import llama_cpp

    length, width = prefix.shape
    if width != llama.n_embd():
        raise ValueError(f"The memory has vectors of width {width}, but the GGUF model needs {llama.n_embd()}.")
    numbers = prefix.detach().float().cpu().contiguous()
    batch = llama_cpp.llama_batch_init(length, width, 1)
    try:
        ctypes.memmove(batch.embd, numbers.data_ptr(), numbers.nbytes)
        batch.n_tokens = length
        for i in range(length):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 0
        llama_cpp.llama_kv_cache_clear(llama.ctx)
        if status := llama_cpp.llama_decode(llama.ctx, batch):
            raise RuntimeError(f"llama.cpp could not read the memory (llama_decode returned {status}).")
        llama.n_tokens = length
    finally:
        llama_cpp.llama_batch_free(batch)
