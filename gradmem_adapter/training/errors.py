"""What can go wrong in training that is nobody's wrong input."""


class TrainingDiverged(RuntimeError):
    """A loss, a gradient or a weight is no longer finite. The last good state is on disk where the message says."""
