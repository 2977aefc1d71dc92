"""What can go wrong in training that is nobody's wrong input."""

from .saving import TrainingDiverged

__all__ = ["TrainingDiverged"]
