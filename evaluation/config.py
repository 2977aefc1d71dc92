"""The configuration of a run: tasks, method, model, training and evaluation, read from YAML."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import pydantic

from gradmem_adapter.config import GradMemConfig, unknown_fields
from gradmem_adapter.training import GradMemTrainingArguments, RowBatches
from gradmem_adapter.utils.fields import from_yaml, read_fields

from .methods import METHODS, Method
from .tasks import TASKS, Task

T = TypeVar("T")
STRICT = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _by_name(what: str, kinds: Mapping[str, type[T]]) -> Callable[[Any], T]:
    """Returns a function that turns {"name": ..., options} into an object of the class with that name."""

    def build(value: Any) -> T:
        if dataclasses.is_dataclass(value):
            return cast(T, value)
        if not isinstance(value, Mapping):
            raise ValueError(f"A {what} must be a mapping with a name, got {value!r}.")
        options = dict(value)
        name = options.pop("name", None)
        if name not in kinds:
            raise ValueError(f"The name of a {what} must be one of {', '.join(sorted(kinds))}, got {name!r}.")
        return pydantic.TypeAdapter(kinds[name]).validate_python(options)

    return build


AnyTask = Annotated[Task, pydantic.PlainValidator(_by_name("task", TASKS))]
AnyMethod = Annotated[Method, pydantic.PlainValidator(_by_name("method", METHODS))]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What to measure of a trained model: every task at every number of write steps and of states.

    Args:
        tasks (`tuple[Task, ...]`, *optional*): as in `RunConfig`; none: the tasks of training.
        write_steps (`tuple[int, ...]`, *optional*, defaults to `(1,)`): numbers of write steps, or of passes.
        states (`tuple[int, ...]`, *optional*, defaults to `(1,)`): how many contexts each question is asked of.
        split (`str`, *optional*, defaults to `"test"`): the split of the data.
    """

    tasks: tuple[AnyTask, ...] = ()
    write_steps: tuple[pydantic.NonNegativeInt, ...] = (1,)
    states: tuple[pydantic.PositiveInt, ...] = (1,)
    split: str = "test"


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RunConfig:
    """How a model is trained and what is measured of it.

    Args:
        tasks (`tuple[Task, ...]`): the tasks of training, each `{name: ..., share: ..., ...}` with the options of its
            class.
        backbone (`str` or `dict`): a local directory, a hub id or package:<package>/<file>.gguf; or the shape of a
            Llama to train from scratch (`scratch_llama`).
        method (`Method`, *optional*, defaults to `gradmem`): `{name: ..., ...}`.
        memory (`dict`, *optional*): fields of `GradMemConfig`; baselines read num_memory_tokens, lora_config and a few.
        batches (`dict`, *optional*): arguments of `RowBatches`, for tasks that do not make their own batches.
        training (`dict`, *optional*): fields of `GradMemTrainingArguments`.
        init_from (`str`, *optional*): a checkpoint of a run to continue training from. If it is of another method,
            which must be a baseline, only its LoRA is used.
        teacher (`str`, *optional*): a checkpoint of a `full_context` run, whose distributions are additional targets
            (see `training.distillation_weight` and `distillation_temperature`).
        tokenized (`str`, *optional*): the file that `python -m evaluation tokenize` made for the same tasks; None:
            their texts are tokenized when training starts.
        evaluation (`Evaluation`, *optional*): what `python -m evaluation run` measures.
        trained_minutes (`float`, *optional*): how long training took; added to the configuration of a finished model.

    Raises:
        ValueError: a field is unknown or has an invalid value; the message names it.
    """

    tasks: Annotated[tuple[AnyTask, ...], pydantic.Field(min_length=1)]
    backbone: str | dict[str, Any]
    method: AnyMethod = field(default_factory=METHODS["gradmem"])
    memory: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    teacher: str | None = None
    tokenized: str | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    trained_minutes: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("memory", _fields(GradMemConfig)),
            ("training", _fields(GradMemTrainingArguments)),
            ("batches", inspect.signature(RowBatches).parameters),
        ):
            if unknown := unknown_fields(getattr(self, name), kind):
                raise ValueError(f"{name} has no field {unknown}")
        if 0 in self.training.get("write_steps", ()) and self.memory.get("start", "slots") == "slots":
            raise ValueError(
                "training.write_steps contains 0, with which memory knows nothing of the context: leave 0 out, or set "
                "memory.start to context or pooled_context."
            )

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> RunConfig:
        """The configuration with these fields, in the types of YAML or JSON."""
        return pydantic.TypeAdapter(cls).validate_python(fields)

    @classmethod
    def load(cls, path: Path | None, settings: Sequence[str] = ()) -> RunConfig:
        """The configuration of a YAML file, with some of its fields overridden.

        Args:
            path (`Path`, *optional*): a file with a mapping of fields.
            settings (`Sequence[str]`, *optional*): "field=value" or "outer.inner=value"; values are YAML.

        Raises:
            ValueError: the file or a setting cannot be read, or a field is unknown or wrong; the message names it.
        """
        return cls.of(read_fields(path, settings))

    def fields(self) -> dict[str, Any]:
        """The fields in JSON types, as `of` takes them."""
        result = dataclasses.asdict(self)
        result["tasks"], result["method"] = _named(self.tasks), _named([self.method])[0]
        result["evaluation"]["tasks"] = _named(self.evaluation.tasks)
        return result

    @property
    def steps(self) -> int | None:
        """The number of training steps: as set, or from a task that makes its own batches; None: epochs are set."""
        return self.training.get("max_steps") or self.tasks[0].steps

    @property
    def write_steps(self) -> tuple[int, ...]:
        """The numbers of write steps that training draws from; none if the method has no steps."""
        if self.method.step is None:
            return ()
        drawn = self.training.get("write_steps") or [k for task in self.tasks for k in task.write_steps]
        return tuple(sorted(set(drawn or [self.memory.get("write_steps", GradMemConfig().write_steps)])))

    @property
    def query_format(self) -> str:
        """As in `GradMemConfig`."""
        return str(self.memory.get("query_format", GradMemConfig().query_format))


def task_of(text: str) -> Task:
    """A task from YAML, such as `{name: kv_retrieval, pairs: 16}`."""
    return _by_name("task", TASKS)(from_yaml(text, text))


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _named(objects: Iterable[Task | Method]) -> list[dict[str, Any]]:
    return [{"name": value.name, **dataclasses.asdict(value)} for value in objects]
