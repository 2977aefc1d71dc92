"""How WRITE is run: one checked object that goes through every layer above it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

from gradmem_adapter.config import unknown_fields
from gradmem_adapter.write.optimizers import OPTIMIZERS

Objective: TypeAlias = Literal["reconstruction", "self_study"]


@dataclass(frozen=True)
class Study:
    """How a model studies a context with `objective="self_study"`; all texts are token ids.

    A query q about a context C is asked as `[before; C; between; q; after]`, and after the memory as `[before; q;
    after]`. `GradMemPipeline` fills in what is left empty here, from its tokenizer and the adapter's `query_format`.

    Args:
        queries (`int`, *optional*, defaults to `32`): the number of queries that the model asks itself, each with an
            answer.
        batch (`int`, *optional*, defaults to `8`): the number of queries that a write step looks at.
        query_tokens (`int`, *optional*, defaults to `24`): the most tokens in a query.
        answer_tokens (`int`, *optional*, defaults to `32`): the most tokens in an answer, at least 2.
        seed (`int`, *optional*, defaults to `0`): determines the queries, and which of them a step looks at.
        before, between, after (`tuple[int, ...]`, *optional*): the tokens around context and query.
        requests (`tuple`, *optional*): pairs, used in turn: what the model is asked in order to make a query, and how
            the query begins. Empty: no queries; the model continues the context instead.
        query_ends (`tuple[int, ...]`, *optional*): tokens that end a query, in addition to the end token.

    Raises:
        ValueError: a number is too small.
    """

    queries: int = 32
    batch: int = 8
    query_tokens: int = 24
    answer_tokens: int = 32
    seed: int = 0
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    requests: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    query_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("queries", 1), ("batch", 1), ("query_tokens", 1), ("answer_tokens", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} of a Study must be an integer >= {least}, got {value!r}.")


class WriteFields(TypedDict, total=False):
    """The fields of `WriteOptions` as keyword arguments of `write`; `None`: as in `options`."""

    steps: int | None
    lr: float | None
    optimizer: str | None
    tolerance: float | None
    stop_when_recovered: bool | None
    last_loss: bool | None
    compile: bool | Literal["auto"] | None
    objective: Objective | None
    study: Study | None
    max_memory: int | Literal["auto"] | None


@dataclass(frozen=True)
class WriteOptions:
    """How a context is written. Where a field is `None`, the adapter's configuration applies.

    Args:
        steps (`int`, *optional*): K, the number of write steps, 0 or more.
        lr (`float`, *optional*): the write learning rate of every step, in place of the configured or learned ones.
        optimizer (`str`, *optional*): the write optimizer, a name in `OPTIMIZERS`: `"sgd"`, `"adam"` or one that was
            added.
        tolerance (`float`, *optional*): stop a sample when a step lowers its write loss by less than this share of it.
            `None`: take all steps.
        stop_when_recovered (`bool`, *optional*, defaults to `False`): stop a sample when each of its tokens is the
            model's first choice, given the true tokens before it.
        last_loss (`bool`, *optional*, defaults to `True`): `False` leaves the last of `write_losses` NaN and skips its
            forward pass, one of 2K + 1 passes in all; a last step that overshoots then goes unnoticed, and a callback
            is not called after it.
        compile (`bool` or `"auto"`, *optional*, defaults to `"auto"`): `True`: compile the model's layers for WRITE
            now, and launch each pass as a CUDA graph. `False`: do neither. `"auto"`: on a GPU, graphs for shapes that
            recur, and compiled layers once WRITE has run long enough for them to pay off; on a CPU, neither. The states
            are the same up to rounding.
        objective (`str`, *optional*, defaults to `"reconstruction"`): what a write step lowers. `"reconstruction"`: the
            write loss. `"self_study"`: how far answers from memory differ from answers given the text, to questions
            that the model makes up. It needs no trained adapter and takes seconds to minutes per context
            (`write/self_study.py`); steps, lr and optimizer then have other defaults.
        study (`Study`, *optional*): how the model studies a context with `"self_study"`.
        max_memory (`int` or `"auto"`, *optional*, defaults to `"auto"`): the most bytes that the contexts of a batch
            may take in addition to the model. `"auto"`: what the device has free. What needs more is done in less, as
            fast as that allows: contexts one after another, layers recomputed in the backward pass, their inputs kept
            on the CPU (`write/plan.py`). What still does not fit is refused.

    Raises:
        ValueError: a field has an invalid value; the message says what was expected.
    """

    steps: int | None = None
    lr: float | None = None
    optimizer: str | None = None
    tolerance: float | None = None
    stop_when_recovered: bool = False
    last_loss: bool = True
    compile: bool | Literal["auto"] = "auto"
    objective: Objective = "reconstruction"
    study: Study = Study()
    max_memory: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.steps is not None and (type(self.steps) is not int or self.steps < 0):
            raise ValueError(f"steps must be a non-negative integer, got {self.steps!r}.")
        if self.lr is not None and not (_is_number(self.lr) and 0 < self.lr < float("inf")):
            raise ValueError(f"lr must be a finite positive number, got {self.lr!r}.")
        if self.optimizer is not None and self.optimizer not in tuple(OPTIMIZERS):  # a list cannot be hashed
            raise ValueError(f"optimizer must be one of {tuple(OPTIMIZERS)}, got {self.optimizer!r}.")
        if self.tolerance is not None and not (_is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(f"tolerance must be at least 0 and less than 1, got {self.tolerance!r}.")
        for name in ("stop_when_recovered", "last_loss"):
            if not isinstance(getattr(self, name), bool):  # "no" and "false" would count as True
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not self.last_loss and self.tolerance is not None:
            raise ValueError(
                "tolerance needs the loss after the last step. Leave last_loss=True, or leave tolerance out."
            )
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ValueError(f"compile must be True, False or 'auto', got {self.compile!r}.")
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {get_args(Objective)}, got {self.objective!r}.")
        if not isinstance(self.study, Study):
            raise ValueError(f"study must be a Study, got {type(self.study).__name__}.")
        if self.max_memory != "auto" and (type(self.max_memory) is not int or self.max_memory < 1):
            raise ValueError(f"max_memory must be a positive integer (bytes) or 'auto', got {self.max_memory!r}.")
        if self.objective == "self_study":
            self._check_self_study()
        elif self.study != Study():
            raise ValueError("study has no effect without objective='self_study'.")

    def _check_self_study(self) -> None:
        if self.tolerance is not None or self.stop_when_recovered:
            raise ValueError(
                "tolerance and stop_when_recovered cannot be used with objective='self_study', where each step looks "
                "at different queries. Leave them out, and set steps."
            )
        if self.compile is True:
            raise ValueError("compile=True cannot be used with objective='self_study'. Use compile='auto'.")
        if self.max_memory != "auto":
            raise ValueError(
                "max_memory applies to objective='reconstruction' only. Use max_memory='auto'; with 'self_study', "
                "Study.queries and Study.batch limit how much is computed at once."
            )

    @classmethod
    def of(cls, options: WriteOptions | None = None, **fields: Unpack[WriteFields]) -> WriteOptions:
        """Options in which the given fields that are not `None` replace those of `options`.

        Args:
            options (`WriteOptions`, *optional*): the options to start from. `None`: the defaults.
            fields: individual fields, by name.

        Raises:
            TypeError: `options` is something else, or there is no such field.
        """
        if options is not None and not isinstance(options, WriteOptions):
            raise TypeError(f"options must be WriteOptions, got {type(options).__name__}.")
        if unknown := unknown_fields(fields, WriteFields.__annotations__):
            raise TypeError(f"WRITE has no option {unknown} See help(WriteOptions) for all options.")
        base = options or cls()
        given: dict[str, Any] = {n: getattr(base, n) if v is None else v for n, v in fields.items()}
        return replace(base, **given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
