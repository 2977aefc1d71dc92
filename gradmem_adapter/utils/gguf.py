"""GGUF files, unpacked into ordinary checkpoints that are cached.

Unpacking takes many seconds, so the result (float32, 4 bytes per weight) is cached in `$GRADMEM_CACHE`, by default
`gradmem` in the user's cache folder. That folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import copy
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

from gradmem_adapter.utils.files import sha256
from gradmem_adapter.utils.pretrained import save_here
from gradmem_adapter.utils.temporary import locked, temporary_directory

_CACHE_FORMAT = 2
"""The format version of cached checkpoints; entries of other versions are ignored."""


def open_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a GGUF file as an ordinary Transformers model, from the cache or, if that fails, by unpacking it.

    Returns:
        The causal LM and its tokenizer.

    Raises:
        ModuleNotFoundError: the file must be unpacked, but the package `gguf` is not installed.
    """
    name = f"{file.stem}-{sha256(file)[:16]}-transformers-{transformers.__version__}-{_CACHE_FORMAT}"
    cached = _cache_folder() / name
    if cached.is_dir():
        with contextlib.suppress(Exception):  # damaged, or another process is rebuilding it right now
            return _open_plain(cached, dtype)
    with contextlib.ExitStack() as stack:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(cached.parent))  # one process unpacks, and the others wait for its result
            folder = stack.enter_context(temporary_directory(cached.parent))
        except OSError as error:
            warnings.warn(
                f"The unpacked backbone could not be cached, so the next load will be as slow as this one ({error}).",
                stacklevel=3,
            )
            folder = stack.enter_context(temporary_directory(Path(tempfile.gettempdir())))
        if cached.is_dir():
            try:
                return _open_plain(cached, dtype)
            except Exception as error:  # any damage: everything in the cache can be rebuilt
                warnings.warn(f"The cached backbone {cached} is damaged and will be rebuilt ({error}).", stacklevel=3)
                shutil.rmtree(cached, ignore_errors=True)
        plain = _dequantise(file, folder / "plain")
        with contextlib.suppress(OSError):  # no cache; or no locks, and another process was faster
            os.replace(plain, cached)
            plain = cached
        return _open_plain(plain, dtype)


def _dequantise(gguf: Path, target: Path) -> Path:
    """Turn a GGUF file into a plain float32 checkpoint in the directory `target`."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("Reading a GGUF backbone needs the package 'gguf': pip install gguf", name="gguf")
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):  # newer Transformers may otherwise leave the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options)
    config = copy.deepcopy(source.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    # Transformers refuses to save a model loaded from GGUF, so its weights go into a new model of the same config.
    auto: Any = AutoModelForCausalLM
    plain = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(source.state_dict(), strict=True)
    plain.generation_config = source.generation_config
    save_here(plain, target)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    _mark_special_tokens(tokenizer, config)
    tokenizer.save_pretrained(target)
    return target


def _mark_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Set a tokenizer's special tokens to those of its GGUF file, as in the model's config.

    Transformers 5.17 sets the end token to the begin token; training would end targets with it.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(config, f"{name}_id", None)
        if isinstance(index, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))


def _open_plain(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a checkpoint made by `_dequantise`; unlike `from_pretrained`, raise if a tensor is missing."""
    opened: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, local_files_only=True, output_loading_info=True, trust_remote_code=False
    )
    model, info = opened
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if kind.endswith("_keys") and keys}
    if wrong:
        raise ValueError(f"The tensors do not match the model: {wrong}")
    return model, AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _cache_folder() -> Path:
    if os.environ.get("GRADMEM_CACHE"):
        return Path(os.environ["GRADMEM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gradmem"
