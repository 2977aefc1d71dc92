"""Any task whose rows are texts: a file of contexts, queries and targets, and a run of `GradMemTrainer` on it."""

from __future__ import annotations

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
from gradmem_adapter.training.collator import read_row
from gradmem_adapter.utils.files import read_text

from .kv_recipe import STRICT, check_memory


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as `GradMemCollator` takes them from JSON lines, gzipped or not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no row, or there is none; the message names the line.
    """
    named = json_lines(path)
    for name, row in named:
        read_row(name, row)
    return [row for _, row in named]


def json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with the place it stands at, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object, or there is none; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of rows {str(path)!r}.")
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name} must be an object with a context, got {type(row).__name__}.")
        found.append((name, row))
    if not found:
        raise ValueError(f"{path} has no rows.")
    return found
