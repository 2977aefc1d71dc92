"""Any task whose rows are texts: a file of contexts, queries and targets, and a run of `GradMemTrainer` on it."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pydantic
from peft import get_peft_model
from transformers import set_seed

from gradmem_adapter.backbones import load_backbone
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.training import GradMemTrainer, GradMemTrainingArguments
from gradmem_adapter.training.rows import json_lines, read_rows

from .kv_recipe import STRICT, check_memory

__all__ = ["RowsRecipe", "json_lines", "read_rows"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RowsRecipe:
    """Everything a training run is made of, as `gradmem train` reads it from YAML."""

    backbone: str
    """A local directory, a hub id, or package:<package>/<file>.gguf."""
    train: str
    """A file of rows, see `read_rows`."""
    task: Literal["rows"] = "rows"
    evaluate: str | None = None
    """A file of rows that are not trained on."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Fields of `GradMemConfig`."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `GradMemTrainingArguments`."""

    def __post_init__(self) -> None:
        check_memory(self.memory)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> RowsRecipe:
        """The recipe with these fields; `ValueError` names one that is unknown or wrong."""
        return pydantic.TypeAdapter(cls).validate_python(fields)

    def trainer(self, output: Path, cpu: bool = False) -> GradMemTrainer:
        """The trainer of this run, which keeps its checkpoints in `output`."""
        arguments = GradMemTrainingArguments(
            output_dir=str(output), use_cpu=cpu, **({"report_to": "none"} | self.training)
        )
        rows, held_out = read_rows(Path(self.train)), None if self.evaluate is None else read_rows(Path(self.evaluate))
        set_seed(arguments.seed)
        backbone, tokenizer = load_backbone(self.backbone)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = get_peft_model(backbone, GradMemConfig(**self.memory))
        return GradMemTrainer(model, arguments, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
