"""The model card of a checkpoint: what the adapter is, how to use it, and what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from gradmem_adapter.backbones import is_local
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.naming import is_hub_id
from gradmem_adapter.utils.directory import CARD
from gradmem_adapter.utils.wording import counted

_OF_THE_RUN = ("runtime", "per_second", "epoch", "jit_")
"""Parts of metric names that describe the run and not the adapter."""
_TEXT = """
# {name}

A [GradMem](https://arxiv.org/abs/2603.13875) adapter for {backbone}.
A text is written once into {m} vectors, the memory state, by a few steps of gradient descent. Then the text is
dropped, and the model answers from the vectors.

| | |
|---|---|
{facts}

## Usage

`pip install gradmem-adapter`

```python
from gradmem_adapter import GradMemPipeline, load_checkpoint

pipeline = GradMemPipeline(*load_checkpoint("{name}"))
memory = pipeline.write("Mary went to the kitchen. John went to the garden.")
print(pipeline.generate("Where is Mary?", memory=memory, max_new_tokens=16)[0])
```

{peft}

## Data

{data}

## Results

{results}

## Licence

{license}
"""
_PEFT = "PEFT alone can also open it, after `import gradmem_adapter`."
_PEFT_AND_BACKBONE = (
    "PEFT alone does not load the trained backbone, which is in the folder `backbone`; `load_checkpoint` loads both."
)


@dataclass(frozen=True)
class Card:
    """What a model card says beyond what the adapter knows.

    Args:
        name (`str`, *optional*): the name to open it by, such as its repository; None: the directory's.
        data (`str`, *optional*): what the adapter was trained on.
        results (`Mapping[str, float]`, *optional*): measurements, by name.
        license (`str`, *optional*): the licence's identifier on the hub, such as `"apache-2.0"`.
        parent (`str`, *optional*): the adapter that training started from, such as `"smollm2-135m-qa"`.
        parent_license (`str`, *optional*): the identifier of the parent's licence.

    Raises:
        TypeError: a field has another type, or a result is not a number.
    """

    name: str | None = None
    data: str | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None
    parent: str | None = None
    parent_license: str | None = None

    def __post_init__(self) -> None:
        for name in ("name", "data", "license", "parent", "parent_license"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TypeError(f"{name} of a Card must be a text, got {value!r}.")
        if not isinstance(self.results, Mapping):
            raise TypeError(
                f"results of a Card must be a mapping of names to numbers, such as {{'f1': 0.9}}, got {self.results!r}."
            )
        for name, value in self.results.items():
            if not (isinstance(name, str) and _is_number(value)):
                raise TypeError(
                    f"results of a Card must be a mapping of names to numbers, but {name!r} has {value!r}. Describe it "
                    "in data."
                )


def _is_number(value: object) -> bool:
    try:
        f"{value:.4g}"
    except (TypeError, ValueError):
        return False
    return True


def write_card(directory: Path, config: GradMemConfig, card: Card, *, name: str | None = None) -> None:
    """Write the model card of an adapter into a directory, replacing an existing one.

    Args:
        directory (`Path`): the directory.
        config (`GradMemConfig`): the adapter's, as it is saved.
        card (`Card`): what else the card says.
        name (`str`, *optional*): the name if `card` has none; None: the directory's.
    """
    named = config.base_model_name_or_path
    metadata = ModelCardData(
        base_model=None if config.train_backbone or not is_hub_id(named) else named,  # the hub accepts only hub ids
        library_name="peft",
        license=card.license,
        pipeline_tag="text-generation",
        tags=["gradmem", "memory", "context-compression"],
    )
    text = _TEXT.format(
        name=card.name or name or directory.name,
        backbone=_backbone(config),
        m=config.num_memory_tokens,
        peft=_PEFT_AND_BACKBONE if config.train_backbone else _PEFT,
        facts="\n".join(f"| {name} | {value} |" for name, value in (_facts(config) | _parent(card)).items()),
        data=card.data or "Not stated.",
        results=_results(card.results),
        license=card.license or _license(card),
    )
    (directory / CARD).write_text(f"---\n{metadata.to_yaml()}\n---\n{text}", encoding="utf-8")
    ModelCard.load(directory / CARD)  # raises if the hub could not read it


def _backbone(config: GradMemConfig) -> str:
    if config.train_backbone:
        return "a backbone that was trained with it and is in the same repository"
    named = config.base_model_name_or_path
    return f"`{named}`" if named and not is_local(named) else "a backbone of your own"


def _facts(config: GradMemConfig) -> dict[str, str]:
    rank = getattr(config.lora_config, "r", None)
    steps = f"{config.write_steps} by {config.write_optimizer}, from start={config.start!r}"
    return {
        "Method": f"GradMem, meta_gradient={config.meta_gradient!r}",
        "Memory vectors (m)": str(config.num_memory_tokens),
        "Write steps (K)": steps,
        "Trained length": counted(config.trained_length, "token") if config.trained_length else "not known",
        "LoRA": f"rank {rank}, active in {config.lora_phase}" if rank else "none",
        "Answer if memory does not hold it": repr(config.refusal) if config.refusal else "not trained to refuse",
    }


def _parent(card: Card) -> dict[str, str]:
    license = f"licence: {card.parent_license}" if card.parent_license else "its card states no licence"
    return {"Started from": f"`{card.parent}` ({license})"} if card.parent else {}


def _license(card: Card) -> str:
    if not card.parent:
        return "Not stated. The licences of the backbone and of the data also apply."
    parent = card.parent_license or "its card states none"
    return (
        f"Not stated. The licence of `{card.parent}`, from which training started, applies ({parent}), as do those of "
        "the backbone and of the data."
    )


def license_of(directory: Path) -> str | None:
    """The licence that the model card in a directory states; None: none, or there is no card that can be read."""
    try:
        license = ModelCard.load(directory / CARD).data.license if (directory / CARD).is_file() else None
    except (OSError, ValueError, YAMLError):
        return None
    return license if isinstance(license, str) else None


def _results(results: Mapping[str, float]) -> str:
    rows = [
        f"| {name.removeprefix('eval_').replace('_', ' ')} | {value:.4g} |"
        for name, value in results.items()
        if not any(part in name for part in _OF_THE_RUN)
    ]
    return "\n".join(["| measure | value |", "|---|---|", *rows]) if rows else "Not stated."
