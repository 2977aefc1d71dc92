"""A directory that holds everything an adapter needs to answer: adapter, tokenizer, backbone or a reference to it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import has_offloaded_params
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.backbones import HUB_IDS, PACKAGED, check_weights, embeddings_of, load_backbone, reference_in
from gradmem_adapter.card import CARD, Card, license_of, write_card
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.naming import saved_config
from gradmem_adapter.peft_model import GradMemPeftModel
from gradmem_adapter.utils.adapter_file import check_holds_adapter, check_tensors, opened_weights, round_weights
from gradmem_adapter.utils.directory import reading_together, replacing_together
from gradmem_adapter.utils.files import opening
from gradmem_adapter.utils.parameters import adapter_parameters, trainable_as_before
from gradmem_adapter.utils.pretrained import save_here
from gradmem_adapter.utils.snapshot import found

BACKBONE = "backbone"
"""The folder of a trained backbone inside a checkpoint."""
OWN = {
    *(PACKAGED, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "adapter_model.bin", BACKBONE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
}
"""The files and folders that a checkpoint may have. Saving replaces them and keeps all others in the directory."""
OWN_PATTERNS = [pattern for name in OWN for pattern in (name, f"{name}/*")]
"""The same as patterns for the hub, including the files in folders."""
_READ_PATTERNS = [CARD, *(pattern for pattern in OWN_PATTERNS if not pattern.startswith("adapter_model.bin"))]
_UNREAD = {BACKBONE, "adapter_model.bin", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"}
"""Names that others may use unless `SHA256SUMS` lists them: a trained backbone is read only if the adapter says that it
has one, and these vocabularies only without a tokenizer.json."""


def save_checkpoint(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: Card | None = None,
) -> None:
    """Save the active adapter and the tokenizer, and the backbone if it was trained, for `load_checkpoint`.

    The directory appears whole or not at all. An existing checkpoint is replaced; other files beside it stay. If the
    process is killed, `load_checkpoint` finds either the old one or the new one. `SHA256SUMS` has the digests of all
    files, which `load_checkpoint` compares.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        path (`str` or `Path`): the directory.
        dtype (`torch.dtype`, *optional*): what the adapter's weights are rounded to in the file; bfloat16 halves its
            size. The rounded adapter has another fingerprint than `model`.
        card (`Card`, *optional*): what the model card says about data, results and licence. An existing card stays.

    Raises:
        FileExistsError: `path` holds something else, which is left alone.
    """
    path = Path(path)
    left = path.is_dir() and all(entry.name.startswith(".gradmem-") for entry in path.iterdir())  # by killed processes
    if path.exists() and not (left or _is_checkpoint(path)):
        raise FileExistsError(
            f"{str(path)!r} exists and is not a checkpoint of a GradMem adapter. Saving could overwrite its content. "
            "Choose another directory."
        )
    save_beside(model, tokenizer, path, dtype=dtype, card=card)


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory holds a GradMem adapter."""
    try:
        return (path / CONFIG_NAME).is_file() and bool(_config(path))
    except ValueError:
        return False


def _config(path: Path) -> GradMemConfig:
    """The configuration in a checkpoint; `ValueError` if it is damaged or belongs to another kind of adapter."""
    check_holds_adapter(path)
    with opening(f"the configuration of the adapter in {str(path)!r}"):
        config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, GradMemConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{path} holds a {kind} adapter, not a GradMem adapter.")
    return config


def _has_backbone(path: Path, config: GradMemConfig) -> bool:
    """Whether a checkpoint holds a trained backbone; a folder with that name alone may have another origin."""
    return config.train_backbone and (path / BACKBONE).is_dir()


def save_beside(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: Card | None = None,
    config: GradMemConfig | None = None,
) -> None:
    """Save like `save_checkpoint`, but into a directory that may already hold other files.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        path (`str` or `Path`): the directory.
        dtype, card (*optional*): see `save_checkpoint`.
        config (`GradMemConfig`, *optional*): the configuration to save for the adapter; None: `saved_config(model)`.
    """
    config = config or saved_config(model)
    with replacing_together(Path(path), OWN) as folder:
        _write(model, tokenizer, folder)
        config.save_pretrained(str(folder))
        write_card(folder, config, card or Card(), name=Path(path).name)
        if dtype is not None:
            round_weights(folder / SAFETENSORS_WEIGHTS_NAME, dtype)


def _write(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights and tokenizer of a checkpoint into an empty folder."""
    backbone = cast(PreTrainedModel, model.get_base_model())
    tensors = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=_is_resized(model)
    )
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    tokenizer.save_pretrained(str(folder))
    if backbone.name_or_path in HUB_IDS:
        (folder / PACKAGED).write_text(backbone.name_or_path + "\n", encoding="utf-8")
    if model.active_peft_config.train_backbone:
        save_here(backbone, folder / BACKBONE, state_dict=backbone_state_dict(model))


def _is_resized(model: PeftModel) -> bool:
    """Whether the backbone has another number of embeddings than the one that the adapter's reference opens."""
    backbone = cast(PreTrainedModel, model.get_base_model())
    named = model.active_peft_config.base_model_name_or_path
    packaged = backbone.name_or_path in HUB_IDS
    there = None if packaged else embeddings_of(named, backbone)
    if there is None:  # or the model was not opened by that name
        there = embeddings_of(backbone.name_or_path, backbone)
    return there is not None and there != _rows(backbone)


def _rows(backbone: PreTrainedModel) -> int:
    """How many embeddings a backbone has, also if they are wrapped by a LoRA layer."""
    return len(cast(Tensor, backbone.get_input_embeddings().weight))


def _saved_rows(directory: Path, backbone: PreTrainedModel) -> int:
    """How many embeddings a checkpoint holds; without any, the number of the backbone's."""
    table = backbone.get_input_embeddings()
    name = next(name for name, module in backbone.named_modules() if module is table)
    with opened_weights(directory / SAFETENSORS_WEIGHTS_NAME) as tensors:
        keys = {f"base_model.model.{place}.weight" for place in (name, f"{name}.base_layer")} & {*tensors.keys()}
        return tensors.get_slice(keys.pop()).get_shape()[0] if keys else _rows(backbone)


def backbone_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The backbone's own tensors, including buffers, under the names they have without an adapter."""
    backbone = model.get_base_model()
    adapters = {id(parameter) for _, parameter in adapter_parameters(backbone)}
    return {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in backbone.state_dict(keep_vars=True).items()
        if id(tensor) not in adapters
    }


def load_weights(model: PeftModel, path: str | Path) -> None:
    """Load a checkpoint's weights into the active adapter of a model, and into its backbone if that is trained.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        path (`str` or `Path`): the checkpoint's directory.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it has no trained backbone and the model needs one.
        ValueError: tensors are missing, unknown or of another shape or type; nothing is changed then.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"There is no adapter checkpoint in {str(path)!r}: it has no {CONFIG_NAME}.")
    with reading_together(path, OWN, _UNREAD):
        _load_weights(model, path)


@torch.no_grad()
def _load_weights(model: PeftModel, path: Path) -> None:
    tuner, resized = cast(GradMemModel, model.base_model), _is_resized(model)
    saved = _adapter_tensors(model, path, embeddings=resized)
    own = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=resized)
    if model.active_peft_config.train_backbone:
        if not _has_backbone(path, _config(path)):
            raise FileNotFoundError(
                f"{str(path)!r} holds only an adapter, but the model trains its backbone. Open it with "
                "load_checkpoint, or create the model with train_backbone=False."
            )
        backbone = cast(PreTrainedModel, model.get_base_model())
        of_backbone = type(backbone).from_pretrained(str(path / BACKBONE), dtype="auto").state_dict()
        trained = backbone_state_dict(model)
        check_tensors(path / BACKBONE, of_backbone, trained)
        saved, own = saved | of_backbone, own | trained
    with tuner.changing():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _adapter_tensors(
    model: PeftModel,
    path: Path,
    *,
    embeddings: bool,
    resize: tuple[int, int] | None = None,
    made_for: str | None = None,
) -> dict[str, Tensor]:
    """The tensors of the adapter in a checkpoint; raises unless they match the active adapter exactly.

    With `embeddings`, they include the embeddings of a backbone that was or will be resized.
    """
    own = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=embeddings)
    with opened_weights(path / SAFETENSORS_WEIGHTS_NAME) as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_tensors(path, loaded, own, resize=resize, made_for=made_for)
    return loaded


@torch.inference_mode(False)  # weights made in inference mode could be read, but WRITE could not use them
def load_checkpoint(
    path: str | Path,
    *,
    backbone: str | Path | PreTrainedModel | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[GradMemPeftModel, PreTrainedTokenizerBase]:
    """Open a checkpoint: a model that writes and reads, and its tokenizer.

    Args:
        path (`str` or `Path`): a directory made by `save_checkpoint` (or by PEFT's `save_pretrained`), the name of a
            checkpoint that ships, such as `"smollm2-135m-qa"`, or of one on the hub: `owner/name`, or
            `owner/name@revision`.
        backbone (`str`, `Path` or `PreTrainedModel`, *optional*): the backbone, or where to find it (see
            `load_backbone`). `None`: the one inside the checkpoint if it was trained, otherwise the one that the
            adapter was made for.
        dtype (`torch.dtype`, *optional*): dtype of the backbone; the adapter stays in float32. `None`: `torch.float32`,
            or that of the model passed.
        device (`str` or `torch.device`, *optional*): where to put both. `None`: the CPU, or the device of the model
            passed.
        is_trainable (`bool`, *optional*, defaults to `False`): keep the adapter trainable.
        revision (`str`, *optional*): branch, tag or commit of a checkpoint on the hub. `None`: the newest.
        token (`str`, *optional*): hub token for the checkpoint; None: the one of `hf auth login`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the adapter is not a GradMem adapter or does not say what its backbone is, its tensors are not
            exactly those that its configuration calls for, a file is damaged, or there is no such device; a backbone
            that was passed is then left unchanged. Or `dtype` or `device` is given with a model as backbone, or
            `revision` with a directory or in addition to that of the name.
    """
    if isinstance(backbone, PreTrainedModel) and not (dtype is None and device is None):
        raise ValueError(
            "dtype and device apply only to a backbone that load_checkpoint opens, but backbone is a model. Move it "
            "yourself with backbone.to(device, dtype), or pass its name or path."
        )
    directory = _find(path, revision, token)
    with reading_together(directory, OWN, _UNREAD):
        return _load(directory, backbone, dtype, device, is_trainable)


def _find(path: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a checkpoint: local, shipped or downloaded."""
    return found(path, _READ_PATTERNS, revision=revision, token=token)


def config_of(path: str | Path) -> GradMemConfig:
    """The configuration of a checkpoint, found as by `load_checkpoint` but without opening it.

    Args:
        path (`str` or `Path`): a directory, or the name of a checkpoint that ships or is on the hub.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is of another kind of adapter, or damaged.
    """
    return _config(_find(path))


def license_in(path: str | Path) -> str | None:
    """The licence that a checkpoint's model card states, found as by `load_checkpoint`; None: none.

    Args:
        path (`str` or `Path`): as for `config_of`.
    """
    return license_of(_find(path))


def _load(
    directory: Path,
    backbone: str | Path | PreTrainedModel | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    is_trainable: bool,
) -> tuple[GradMemPeftModel, PreTrainedTokenizerBase]:
    config = _config(directory)
    tokenizer: PreTrainedTokenizerBase | None = None
    if (directory / "tokenizer_config.json").is_file():
        with opening(f"the tokenizer in {str(directory)!r}"):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    own = _has_backbone(directory, config)
    as_made = backbone is None and not own
    if backbone is None:
        backbone = str(directory / BACKBONE) if own else reference_in(directory, config.base_model_name_or_path)
    if backbone is None:
        raise ValueError(
            f"The adapter in {directory} does not name its backbone, because the backbone was created from a "
            "configuration. Pass backbone=, a model or its name or path."
        )
    if isinstance(backbone, str | Path):
        reference = str(backbone)
        dtype, device = dtype or torch.float32, "cpu" if device is None else device
        revision = config.revision if reference == config.base_model_name_or_path else None
        backbone, tokenizer = load_backbone(
            reference, dtype=dtype, device=device, tokenizer=tokenizer, revision=revision
        )
        if as_made:
            check_weights(directory, reference)
    elif not isinstance(backbone, PreTrainedModel):
        raise TypeError(f"The backbone must be a model, or its name or path, got {backbone!r}.")
    if tokenizer is None:
        raise ValueError(f"There is no tokenizer in {directory}; save one there with tokenizer.save_pretrained.")
    config.inference_mode = not is_trainable
    # No values yet, so that a huge size in a configuration costs nothing before it is compared with the file. Not with
    # offloaded layers: PEFT would move the loaded LoRA to their device, meta.
    empty = not any(has_offloaded_params(module) for module in backbone.modules())
    with trainable_as_before(backbone):  # it may belong to the caller
        resize = _rows(backbone), _saved_rows(directory, backbone)
        if resized := resize[0] != resize[1]:  # cannot be undone, so everything else is compared first
            model, _ = _attached(backbone, config, directory, empty, resized, resize)
            cast(GradMemModel, model.base_model).unload()
            backbone.resize_token_embeddings(resize[1], mean_resizing=False)
        model, tensors = _attached(backbone, config, directory, empty, resized)
    if empty:  # before the values, which PEFT would round to the dtype of their layer
        places = get_peft_model_state_dict(model, save_embedding_layers=False)
        places = {name: torch.empty_like(place, device="cpu") for name, place in places.items()}
        set_peft_model_state_dict(model, places, low_cpu_mem_usage=True)
        cast(GradMemModel, model.base_model)._cast_adapter_dtype(model.active_adapter)
    set_peft_model_state_dict(model, tensors)  # also embeddings, which the output head may share
    opened = backbone.name_or_path or ""
    if (named := HUB_IDS.get(opened, opened)) and named != config.base_model_name_or_path and not config.train_backbone:
        config.base_model_name_or_path, config.revision = named, None
    return cast(GradMemPeftModel, model.eval()), tokenizer


def _attached(
    backbone: PreTrainedModel,
    config: GradMemConfig,
    directory: Path,
    empty: bool,
    resized: bool,
    resize: tuple[int, int] | None = None,
) -> tuple[PeftModelForCausalLM, dict[str, Tensor]]:
    """A backbone with an adapter that has no values yet, and the checkpoint's tensors, which match its shapes."""
    with torch.device("meta") if empty else nullcontext():
        model = PeftModelForCausalLM(backbone, config, low_cpu_mem_usage=empty)
    try:  # checked here, because PEFT's errors name neither the file nor all differences
        embeddings, made_for = resized or _is_resized(model), config.base_model_name_or_path
        return model, _adapter_tensors(model, directory, embeddings=embeddings, resize=resize, made_for=made_for)
    except BaseException:
        cast(GradMemModel, model.base_model).unload()
        raise
