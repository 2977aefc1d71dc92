"""Meta-training: rows of texts or ready batches, a Trainer, and the scores of answers."""

from .arguments import GradMemTrainingArguments
from .batches import Batches, RowBatches
from .collator import GradMemCollator
from .metrics import score_answer
from .rows import read_rows
from .saving import TrainingDiverged
from .trainer import GradMemTrainer

__all__ = [
    "Batches",
    "GradMemCollator",
    "GradMemTrainer",
    "GradMemTrainingArguments",
    "RowBatches",
    "TrainingDiverged",
    "read_rows",
    "score_answer",
]
