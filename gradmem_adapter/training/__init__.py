"""Meta-training: rows of texts, a Trainer, a curriculum, and the scores of answers."""

from .arguments import GradMemTrainingArguments
from .collator import GradMemCollator
from .curriculum import Curriculum, Stage
from .errors import TrainingDiverged
from .metrics import exact_match, normalize_answer, score_answer, token_f1
from .trainer import GradMemTrainer

__all__ = [
    "Curriculum",
    "GradMemCollator",
    "GradMemTrainer",
    "GradMemTrainingArguments",
    "Stage",
    "TrainingDiverged",
    "exact_match",
    "normalize_answer",
    "score_answer",
    "token_f1",
]
