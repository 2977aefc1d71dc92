"""Export the model that READ needs as a plain model directory, which engines open without this package."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.checkpoint import backbone_state_dict
from gradmem_adapter.export.chat_template import memory_first
from gradmem_adapter.utils.directory import replacing_together
from gradmem_adapter.utils.pretrained import save_here

LORA = "lora"
"""The folder of the LoRA inside an exported directory."""
GGUF_TYPES = {"float32": "f32", "float16": "f16"}
"""Types of a GGUF file, and their names in llama.cpp's converter. Quantised types are left out: answers differ."""
CONVERTER = "convert_hf_to_gguf.py"


def export_model(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    merge: bool = True,
    gguf: Literal["float32", "float16"] | None = None,
) -> None:
    """Export the model that answers from memory to a Hugging Face directory, which appears whole or not at all.

    A LoRA that is active in WRITE only is left out, since READ is then the plain backbone. The tokenizer's chat
    template is extended to put memory first.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter; left unchanged.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        path (`str` or `Path`): a new or empty directory.
        merge (`bool`, *optional*, defaults to `True`): merge the LoRA into the weights. `False`: the backbone's own
            weights, with the folder `lora`, a plain PEFT adapter, beside them; an engine then serves both.
        gguf (`"float32"` or `"float16"`, *optional*): also write `model.gguf` for llama.cpp, with its own converter.

    Raises:
        FileExistsError: `path` holds something, which is left alone.
        FileNotFoundError: llama.cpp's converter is not on the PATH.
        NotImplementedError: the weights cannot be exported, because they are quantised, or the LoRA would be merged
            into an embedding that is also the output head.
        RuntimeError: the converter failed.
        ValueError: `gguf` with `merge=False`: a GGUF file holds one model.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and all(entry.name.startswith(".gradmem-") for entry in path.iterdir())):
        raise FileExistsError(f"{str(path)!r} exists and is not empty. Name a new directory.")
    if gguf is not None and not merge:
        raise ValueError("A GGUF file holds one model, so the LoRA must be merged: pass merge=True (--merge).")
    converter = None if gguf is None else _converter()
    backbone = cast(PreTrainedModel, model.get_base_model())
    if getattr(backbone, "is_quantized", False):
        raise NotImplementedError(
            "The backbone is quantised, and exported weights would be rounded again. Open the checkpoint with a "
            "backbone in float32 or bfloat16."
        )
    config = model.active_peft_config
    lora = config.lora_config if config.lora_phase != "write" else None
    weights = backbone_state_dict(model)
    if isinstance(lora, LoraConfig) and merge:
        weights |= _merged(backbone, model.active_adapter, weights)
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = memory_first(tokenizer.chat_template)
    with replacing_together(path, ()) as folder:
        save_here(backbone, folder, state_dict=weights)
        _name_rope_as_before(folder / "config.json")
        tokenizer.save_pretrained(str(folder))
        if isinstance(lora, LoraConfig) and not merge:
            _write_lora(model, lora, folder / LORA)
        if gguf is not None and converter is not None:
            _convert(converter, folder, GGUF_TYPES[gguf])


def _merged(backbone: PreTrainedModel, adapter: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a LoRA changes, with the LoRA merged. Each sum is rounded only once."""
    merged: dict[str, Tensor] = {}
    for name, layer in backbone.named_modules():
        if not isinstance(layer, LoraLayer) or ".base_layer" in name:  # of nested LoRA layers, only the outermost
            continue
        own = {key: tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
        _check_untied(own, weights)
        dtype = next(iter(own.values())).dtype
        copied: Any = copy.deepcopy(cast(nn.Module, layer)).to(torch.promote_types(dtype, torch.float32))
        for part in copied.modules():
            if isinstance(part, LoraLayer) and adapter in part._get_available_adapters():
                part.merge(safe_merge=True, adapter_names=[adapter])
        result = copied.get_base_layer().state_dict()
        merged |= {key: result[key.removeprefix(f"{name}.")].to(tensor.dtype) for key, tensor in own.items()}
    return merged


def _check_untied(own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    places = {tensor.data_ptr(): key for key, tensor in own.items()}
    for key, tensor in weights.items():
        if key not in own and tensor.numel() and tensor.data_ptr() in places:
            raise NotImplementedError(
                f"{places[tensor.data_ptr()]} and {key} share one tensor, but the LoRA changes only one of them, so it "
                "cannot be merged. Export it beside the backbone (merge=False, --lora)."
            )


def _name_rope_as_before(file: Path) -> None:
    """Add the names that rotary embeddings had before Transformers 5 to a configuration: other programs, such as
    llama.cpp's converter, look for these and silently use a default if they are missing."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return
    config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_lora(model: PeftModel, lora: LoraConfig, folder: Path) -> None:
    """Write an adapter's LoRA in PEFT's format."""
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    own = {name: tensor.contiguous() for name, tensor in tensors.items() if "gradmem_" not in name}
    config = copy.deepcopy(lora)
    config.task_type, config.inference_mode = TaskType.CAUSAL_LM, True
    config.save_pretrained(str(folder))
    save_file(own, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _converter() -> str:
    """The path of llama.cpp's converter."""
    found = shutil.which(CONVERTER)
    if found is None:
        raise FileNotFoundError(
            f"A GGUF file needs llama.cpp's own converter, but there is no {CONVERTER} on the PATH. Get it with "
            "llama.cpp (git clone https://github.com/ggml-org/llama.cpp), add that directory to the PATH, and install "
            "gguf: pip install gguf."
        )
    return found


def _convert(converter: str, folder: Path, outtype: str) -> None:
    command = [sys.executable, converter, str(folder), "--outfile", str(folder / "model.gguf"), "--outtype", outtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"llama.cpp's converter ({converter}) failed: {result.stderr.strip()[-800:]}")
