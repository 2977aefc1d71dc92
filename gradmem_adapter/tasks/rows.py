"""Any task whose rows are texts: a file of contexts, queries and targets, and a run of `GradMemTrainer` on it."""

from __future__ import annotations

import gzip
import json
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pydantic
from peft import get_peft_model
from transformers import set_seed

from gradmem_adapter.backbones import load_backbone
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.training import GradMemTrainer, GradMemTrainingArguments

from .kv_recipe import STRICT


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as `GradMemCollator` takes them from JSON lines, gzipped or not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object, or there is none; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of rows {str(path)!r}.")
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object with a context, got {type(row).__name__}.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows
