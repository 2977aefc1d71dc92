"""Memory written by gradient steps: the method of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pydantic
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.checkpoint import load_checkpoint, load_weights, save_checkpoint
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.prompts import study_tokens
from gradmem_adapter.state import MemoryState
from gradmem_adapter.write.options import Objective, Study, WriteOptions

from .base import OPTIONS, Method


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class GradMem(Method):
    """A GradMem adapter.

    Args:
        dtype (`str`, *optional*): dtype of the adapter's weights when the model is saved.
        objective (`str`, *optional*, defaults to `"reconstruction"`): as in `WriteOptions`; used when measuring.
    """

    dtype: Literal["bfloat16", "float16"] | None = None
    objective: Objective = "reconstruction"

    name = "gradmem"
    title = "GradMem"
    color, marker = "#0072b2", "o"
    step = "step"

    @property
    def settings(self) -> dict[str, Any]:
        """The objective, unless it is the default."""
        return {} if self.objective == "reconstruction" else {"objective": self.objective}

    def build(self, backbone: PreTrainedModel, memory: Mapping[str, Any]) -> nn.Module:
        """See `Method.build`."""
        return get_peft_model(backbone, GradMemConfig(**memory))

    def save(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        """Save a checkpoint for `load_checkpoint`."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        save_checkpoint(cast(PeftModel, model), tokenizer, path, dtype=dtype)

    def load_weights(self, model: nn.Module, path: Path) -> None:
        """See `Method.load_weights`."""
        load_weights(cast(PeftModel, model), path)

    def load(
        self, path: Path, device: torch.device | str, build: Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """See `Method.load`; the checkpoint itself describes the model."""
        return load_checkpoint(path, device=device)

    def read(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], steps: int
    ) -> MemoryState:
        """The memory states of contexts."""
        options = WriteOptions(steps=steps, last_loss=False)
        if self.objective == "self_study":
            study = Study(**study_tokens(model.active_peft_config.query_format, tokenizer))
            options = replace(options, objective="self_study", study=study)
        return cast(MemoryState, model.write_many(contexts, progress=False, options=options))

    def length(self, model: Any, context: list[int]) -> int:
        """m."""
        return int(model.active_peft_config.num_memory_tokens)

    def generate(
        self, model: Any, kept: Any, reads: list[list[int]], query: Tensor, mask: Tensor, **options: Any
    ) -> Tensor:
        """See `Method.generate`."""
        memory = MemoryState.concat([kept[[row[j] for row in reads]] for j in range(len(reads[0]))])
        output: Tensor = model.generate(input_ids=query, attention_mask=mask, memory=memory, **options)
        return output[:, query.shape[1] :]
