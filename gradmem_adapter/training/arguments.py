"""What can be set about a training run, beside everything of Transformers' `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments


@dataclass
class GradMemTrainingArguments(TrainingArguments):
    """Transformers' training arguments and those of GradMem.

    Raises:
        TypeError, ValueError: a value that cannot work; the message names it.
    """

    remove_unused_columns: bool = field(
        default=False,
        metadata={
            "help": "False: the dataset's columns are texts, which the collator turns into what the model takes."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a loss that is not finite stops the training instead of hiding."}
    )
    min_write_steps: int | None = field(
        default=None, metadata={"help": "Least K of an optimizer step. None: the config's write_steps."}
    )
    max_write_steps: int | None = field(
        default=None, metadata={"help": "Most K of an optimizer step, drawn uniformly. None: the config's write_steps."}
    )
    eval_write_steps: int | None = field(
        default=None, metadata={"help": "K in evaluation. None: the config's write_steps."}
    )
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Evaluation answers the queries greedily and scores the texts."}
    )
    generation_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Most new tokens of an answer. None: a few more than the longest target."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (
            ("min_write_steps", 0), ("max_write_steps", 0), ("eval_write_steps", 0), ("generation_max_new_tokens", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer or None, got {value!r}.")
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if None not in (self.min_write_steps, self.max_write_steps) and self.min_write_steps > self.max_write_steps:  # type: ignore[operator]
            raise ValueError(
                f"min_write_steps is {self.min_write_steps} and max_write_steps {self.max_write_steps}: swap them."
            )


def with_defaults(args: TrainingArguments) -> GradMemTrainingArguments:
    """The same object; a plain `TrainingArguments` gets the fields of GradMem, at their defaults."""
    for own in fields(GradMemTrainingArguments):
        if not hasattr(args, own.name):
            setattr(args, own.name, own.default)
    return args  # type: ignore[return-value]
