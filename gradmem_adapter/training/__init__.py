"""Meta-training: rows of texts or ready batches, a Trainer, and the scores of answers."""

from .arguments import GradMemTrainingArguments
from .batches import Batches, RowBatches
from .collator import GradMemCollator
from .metrics import exact_match, normalize_answer, score_answer, token_f1
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
    "exact_match",
    "normalize_answer",
    "read_rows",
    "score_answer",
    "token_f1",
]
