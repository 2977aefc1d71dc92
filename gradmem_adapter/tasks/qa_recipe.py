"""What a training run on questions about texts is made of: sources, method, steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.backbones import check_end_token, load_backbone
from gradmem_adapter.baselines import ForwardMemory, FullContext, MeanPooling, PrefixModel, TruncatedText
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.training.graphed_run import lr_share

from .babi import babi_rows
from .babi_questions import EVERY_QUESTION, with_every_question
from .kv_recipe import STRICT, Drawn, check_memory
from .plain_text import text_rows
from .qa import group, qa_rows
from .qa_batches import Pool, Rows
from .saved import load_trained

METHODS = ("gradmem", "forward_memory", "mean_pooling", "truncated_text", "no_context", "full_context")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class QASource:
    """Texts with questions: a bAbI task, or passages (FairytaleQA, SQuAD)."""

    source: str
    """A directory or a dataset on the hub, see `qa_rows` and `babi_rows`."""
    babi: int | None = None
    """The number of a bAbI task; None: passages."""
    share: pydantic.NonNegativeFloat = 1.0
    """Of training, against the other sources."""
    every_question: bool = False
    """In training, ask all that a story of bAbI 1, 2 or 5 answers (`with_every_question`), not its own question."""
    text: bool = False
    """In training, plain text (`text_rows`): the passages, and what comes after some of their words. In evaluations it
    is left out."""
    options: dict[str, Any] = field(default_factory=dict)
    """What `qa_rows` and `babi_rows` take for the hub."""

    def __post_init__(self) -> None:
        if self.text and self.babi is not None:
            raise ValueError(f"text is for texts, not for {self.name}.")
        if self.every_question and self.babi not in EVERY_QUESTION:
            raise ValueError(f"every_question is for the bAbI tasks {EVERY_QUESTION}, not for {self.name}.")

    @property
    def name(self) -> str:
        """As tables name it: "babi 2", or the last part of the source."""
        return f"babi {self.babi}" if self.babi is not None else self.source.rstrip("/").rpartition("/")[2]

    def rows(self, split: str) -> Rows:
        """The rows of "train", "valid" or "test"."""
        if self.babi is None:
            return qa_rows(self.source, split, **self.options)
        return babi_rows(self.source, self.babi, split, **self.options)

    def training_rows(self) -> Rows:
        """The rows of "train", each context once with the questions on it."""
        if self.text:
            return text_rows(self.source, "train", **self.options)
        rows = self.rows("train")
        if self.babi is None:
            return rows
        if self.every_question:
            return with_every_question(rows, self.babi)
        return group((row["context"], row["query"], [row["target"]]) for row in rows)


class QAKind(NamedTuple):
    """What decides the shapes of a step, and so the graph that it is captured in."""

    pool: int
    contexts: int
    length: int
    write_steps: int
    side_by_side: int

    @property
    def name(self) -> str:
        """Context length, write steps and states, as "N=256 K=2 S=1"."""
        return f"N={self.length} K={self.write_steps} S={self.side_by_side}"


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class QARecipe:
    """Everything a training run is made of, as `gradmem train` reads it from YAML."""

    backbone: str
    """A local directory, a hub id, or package:<package>/<file>.gguf."""
    sources: tuple[QASource, ...]
    task: Literal["answers"] = "answers"
    method: str = "gradmem"
    memory: dict[str, Any] = field(default_factory=dict)
    """Fields of `GradMemConfig`; baselines read num_memory_tokens, reconstruction_weight and lora_config."""
    init_from: str | None = None
    """A checkpoint by a recipe with the same model, whose weights are trained further (`write_lr_from_end` may be new);
    None: untrained weights."""
    write_steps: Annotated[tuple[pydantic.NonNegativeInt, ...], pydantic.Field(min_length=1)] = (1, 2, 3, 4, 5)
    """K (or passes) of a step is drawn from these; 0, where WRITE starts from the context, trains that start alone."""
    side_by_side: Drawn = (1,)
    """How many states a question is asked of, drawn from these."""
    buckets: Drawn = (64, 128, 192, 256, 384, 512, 768, 1024)
    """Contexts are padded to the smallest of these lengths that holds them."""
    drop_longer: bool = False
    """Leave contexts longer than the largest bucket out of training, instead of refusing them."""
    query_tokens: pydantic.PositiveInt | None = None
    """Leave questions out of training that have more tokens than this, with their targets."""
    tokens: pydantic.PositiveInt = 8192
    """Context tokens of a batch, padding counted."""
    contexts: pydantic.PositiveInt = 128
    """Most contexts of a batch."""
    queries: pydantic.PositiveInt = 2
    """Questions on each context of a batch."""
    steps: pydantic.PositiveInt = 1000
    minutes: pydantic.PositiveFloat | None = None
    """End after so many minutes of training, if `steps` are not done before; the learning rate falls by the clock then,
    and the recipe in the checkpoint has the steps that there was time for."""
    lr: float = 5e-4
    warmup_steps: int = 50
    decay_share: float = 0.5
    """The last share of the run, over which the learning rate falls to a twentieth."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    muon_rate: pydantic.PositiveFloat | None = None
    """Train the matrices inside the layers by Muon, at this many times the learning rate; None: AdamW trains all."""
    write_rate_factor: pydantic.PositiveFloat = 1.0
    """Train the write learning rates at this many times the learning rate."""
    max_grad_norm: float = 1.0
    bf16: bool = True
    seed: int = 0
    lora_dtype: Literal["bfloat16", "float16"] | None = None
    """What the LoRA's weights are rounded to when the model is saved."""
    compile: bool = True
    """Compile the backbone's layers, on a GPU."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if not self.sources:
            raise ValueError("A recipe needs at least one source.")
        check_memory(self.memory)
        starts = self.method != "forward_memory" and self.memory.get("start", "slots") != "slots"
        if 0 in self.write_steps and not starts:
            raise ValueError(
                "write_steps holds 0, after which memory knows nothing of the context: leave it out, or use method "
                "gradmem with memory.start='context' or 'pooled_context'."
            )
        if self.contexts < max(self.side_by_side):
            raise ValueError(
                f"contexts is {self.contexts}, and a question is asked of up to {max(self.side_by_side)} contexts."
            )
        if self.tokens < max(self.buckets) * max(self.side_by_side):
            raise ValueError(
                f"tokens is {self.tokens}, and a batch must hold {max(self.side_by_side)} contexts of "
                f"{max(self.buckets)} tokens, the largest bucket."
            )

    @classmethod
    def of(cls, fields: dict[str, Any]) -> QARecipe:
        """The recipe with these fields; `ValueError` names one that is unknown or wrong."""
        return pydantic.TypeAdapter(cls).validate_python(fields)

    def lr_at(self, step: int, share: float) -> float:
        """Warm-up, then constant, then a linear decay to a twentieth."""
        return self.lr * lr_share(step, share, self.warmup_steps, self.decay_share)

    def kind_of(self, pools: Sequence[Pool], step: int) -> QAKind:
        """The batch and the write steps of a step, drawn by its number alone, so that a resumed run draws the same."""
        draw = random.Random(f"{self.seed}:{step}")
        number = draw.choices(range(len(pools)), [pool.share for pool in pools])[0]
        length = pools[number].contexts.shape[1]
        steps = 1 if self.method in ("mean_pooling", "truncated_text", "no_context", "full_context") else None
        write_steps, side_by_side = steps or draw.choice(self.write_steps), draw.choice(self.side_by_side)
        # The full context stands before every query, as often as there are queries on it.
        copies = side_by_side * min(self.queries, pools[number].most_queries) if self.method == "full_context" else 1
        contexts = max(side_by_side, min(self.tokens // (length * copies), self.contexts))
        return QAKind(number, contexts, length, write_steps, side_by_side)

    @property
    def num_memory_tokens(self) -> int:
        """m; 0 where there is no memory of fixed size."""
        if self.method in ("no_context", "full_context"):
            return 0
        return int(self.memory.get("num_memory_tokens", GradMemConfig().num_memory_tokens))

    def build(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model before training, and its tokenizer.

        Raises:
            ValueError: the tokenizer's end token is not one that the backbone stops at.
        """
        backbone, tokenizer = load_backbone(self.backbone)
        check_end_token(backbone, tokenizer)
        torch.manual_seed(self.seed)
        model = self._untrained(backbone)
        if self.init_from is not None:
            load_trained(model, Path(self.init_from))
        return model, tokenizer

    def _untrained(self, backbone: PreTrainedModel) -> nn.Module:
        if self.method == "gradmem":
            return get_peft_model(backbone, GradMemConfig(**self.memory))
        lora = self.memory.get("lora_config")
        if lora is None:
            backbone.requires_grad_(bool(self.memory.get("train_backbone")))
        else:
            inject_adapter_in_model(LoraConfig(**lora), backbone)
        return self._baseline(backbone)

    def _baseline(self, backbone: PreTrainedModel) -> PrefixModel:
        m = self.num_memory_tokens
        if self.method == "forward_memory":
            return ForwardMemory(backbone, m, float(self.memory.get("reconstruction_weight", 0.0)))
        if self.method == "mean_pooling":
            return MeanPooling(backbone, m)
        return FullContext(backbone) if self.method == "full_context" else TruncatedText(backbone, m)

    @property
    def query_format(self) -> str:
        """As in `GradMemConfig`."""
        return str(self.memory.get("query_format", "chat"))
