"""Check GradMem on every way to load a backbone: dtypes, attention, compilation, placement, quantisation."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import textbook
from gradmem_adapter import GradMemConfig

from .results import Record, add_records, load_records

MEMORY, STEPS, LR, NEW_TOKENS = 3, 2, 0.3, 4
VOCABULARY = 128
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
FULL, HALF = {"": 1e-3, "finite_difference": 5e-2}, {"": 0.15, "finite_difference": 0.5}
"""Bounds of all relative errors, compared with the textbook implementation, in float32 and in 16 bits."""
ROUNDED = FULL | {"finite_difference": 1.0}
"""Bounds if activations are rounded: differences of gradients see the steps of rounding. Attaching warns of this."""


@dataclass(frozen=True)
class Variant:
    """A way to load a backbone.

    Args:
        name (`str`): its name in the table.
        load (`Callable`): loads the model in a folder.
        needs (`str`, *optional*): a package, or "a GPU".
        bounds (`dict`, *optional*): bounds of relative errors, by meta-gradient; "" for everything else.
        meta_gradients (`tuple`, *optional*): the strategies that are compared with plain autograd.
        same_as (`Callable`, *optional*): loads the model to compare with; defaults to `load`.
        write (`dict`, *optional*): options of WRITE.
    """

    name: str
    load: Callable[[Path], PreTrainedModel]
    needs: str | None = None
    bounds: dict[str, float] = field(default_factory=lambda: FULL)
    meta_gradients: tuple[str, ...] = ("exact", "finite_difference", "first_order")
    same_as: Callable[[Path], PreTrainedModel] | None = None
    write: dict[str, Any] = field(default_factory=dict)


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    """The tiny model, in eval mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)
    return model.eval()


def compiled(folder: Path) -> PreTrainedModel:
    """The model with each layer compiled by `torch.compile`."""
    model = opened(folder)
    for layer in model.model.layers:
        layer.compile()
    return model


def checkpointed(folder: Path, attention: str) -> PreTrainedModel:
    """The model in training mode with gradient checkpointing; a Llama has no dropout."""
    model = opened(folder, attn_implementation=attention).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def layer_on_disk(folder: Path) -> PreTrainedModel:
    """The model with its last layer on disk."""
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.1": "disk"} | dict.fromkeys(names, "cpu")
    return opened(folder, device_map=places, offload_folder=folder / "offload")


def quantised(folder: Path, config: Callable[[], Any]) -> PreTrainedModel:
    return opened(folder, quantization_config=config())


def torchao(name: str) -> Callable[[], Any]:
    """A function that makes a torchao configuration by name, importing the library only when called."""
    return lambda: transformers.TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


def quanto(weights: str) -> Callable[[], Any]:
    """The same for quanto."""
    return partial(transformers.QuantoConfig, weights=weights)


CPU = torch.device("cpu")
ONCE = ("finite_difference", "first_order")
"""The strategies that differentiate attention only once."""
on_gpu = partial(opened, device_map={"": 0})
flex = partial(on_gpu, attn_implementation="flex_attention")
bitsandbytes_8 = partial(quantised, config=partial(transformers.BitsAndBytesConfig, load_in_8bit=True))
nf4 = partial(transformers.BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4")
VARIANTS = (
    Variant("float32, attention sdpa", opened),
    Variant("float32, attention eager", partial(opened, attn_implementation="eager")),
    Variant("float32, attention flex", flex, "a GPU", meta_gradients=ONCE, same_as=on_gpu),
    Variant("bfloat16", partial(opened, dtype=torch.bfloat16), bounds=HALF),
    Variant("float16", partial(opened, dtype=torch.float16), bounds=HALF),
    Variant("gradient checkpointing, attention sdpa", partial(checkpointed, attention="sdpa"), same_as=opened),
    Variant("gradient checkpointing, attention eager", partial(checkpointed, attention="eager"), same_as=opened),
    Variant("torch.compile of each layer", compiled, meta_gradients=ONCE, same_as=opened),
    Variant("WRITE with compile=True", opened, write={"compile": True}),
    Variant("WRITE in CUDA graphs", on_gpu, "a GPU", write={"compile": True}),
    Variant('device_map="auto", one device', partial(opened, device_map="auto"), same_as=opened),
    Variant('device_map="auto", several GPUs', partial(opened, device_map="auto"), "several GPUs", same_as=on_gpu),
    Variant("offloaded to CPU memory", lambda f: cpu_offload(opened(f), execution_device=CPU), same_as=opened),
    Variant("offloaded to a disk", lambda f: disk_offload(opened(f), f / "disk", execution_device=CPU), same_as=opened),
    Variant("one layer on a disk", layer_on_disk, same_as=opened),
    Variant("bitsandbytes 8 bit", bitsandbytes_8, "bitsandbytes", bounds=ROUNDED),
    Variant("bitsandbytes 4 bit (nf4)", partial(quantised, config=nf4), "bitsandbytes"),
    Variant("torchao int8 weights", partial(quantised, config=torchao("Int8WeightOnlyConfig")), "torchao"),
    Variant("torchao float8 weights", partial(quantised, config=torchao("Float8WeightOnlyConfig")), "torchao"),
    Variant(
        "torchao int8 weights and activations",
        partial(quantised, config=torchao("Int8DynamicActivationInt8WeightConfig")),
        "torchao",
    ),
    Variant("quanto int8 weights", partial(quantised, config=quanto("int8")), "optimum.quanto"),
    Variant("quanto float8 weights", partial(quantised, config=quanto("float8")), "optimum.quanto"),
)


def missing(variant: Variant) -> str | None:
    """What a variant needs but this machine lacks; None if nothing."""
    needs = variant.needs
    if needs is None:
        return None
    if needs.endswith(("GPU", "GPUs")):
        return None if torch.cuda.device_count() >= (2 if "several" in needs else 1) else needs
    top = needs.partition(".")[0]
    return None if importlib.util.find_spec(top) and importlib.util.find_spec(needs) else needs


def save_tiny(folder: Path) -> None:
    """Save a random Llama whose sizes all libraries support, and whose predictions vary with its input."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)


def check(variant: Variant) -> dict[str, Any]:
    """The findings for a variant: `verdict` (as explained by the table), `reason` and `errors`."""
    if (needed := missing(variant)) is not None:
        return {"verdict": "not run", "reason": f"it needs {needed}", "errors": {}}
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tiny(Path(folder))
        try:
            backbone = variant.load(Path(folder))
            config = GradMemConfig(
                num_memory_tokens=MEMORY, write_steps=STEPS, write_lr=LR, memory_init_std=0.5, lora_config=LORA
            )
            torch.manual_seed(1)
            try:
                model = get_peft_model(backbone, config)
            except (TypeError, ValueError, NotImplementedError) as refusal:
                return {"verdict": "refused", "reason": _said(refusal), "errors": {}}
            compare(variant, model, (variant.same_as or variant.load)(Path(folder)), errors)
        except Exception as problem:
            return {"verdict": "crashes", "reason": _said(problem), "errors": errors}
    bounds = {name: variant.bounds.get(name, variant.bounds[""]) for name in errors}
    wrong = [f"{name} {errors[name]:.1e}" for name in errors if not errors[name] <= bounds[name]]
    return {"verdict": "wrong" if wrong else "passes", "reason": ", ".join(wrong), "errors": errors}


def compare(variant: Variant, model: Any, plain: PreTrainedModel, errors: dict[str, float]) -> None:
    """Measure into `errors` how far WRITE (twice), READ, generate and the outer gradients are from the textbook."""
    model.train(model.get_base_model().training)
    own = model.get_base_model().state_dict()
    plain = cast(PreTrainedModel, get_peft_model(plain, LORA).get_base_model())
    plain.load_state_dict({name: value for name, value in own.items() if "lora_" in name}, strict=False)
    trained = {name: p for name, p in model.get_base_model().named_parameters() if p.requires_grad}
    slots = trained.pop("memory_slots.gradmem_memory.default")
    contexts, queries = (_tokens(length, plain) for length in (9, 5))
    start = slots.detach()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        memory = textbook.write(plain, start, contexts, STEPS, LR, second_order_steps=0).detach()
    for name in ("WRITE", "WRITE again"):
        state = model.write(contexts, **variant.write)
        errors[name] = _distance(state.vectors - start, memory - start)
    inputs = torch.cat([memory.requires_grad_().to(plain.dtype), plain.get_input_embeddings()(queries)], dim=1)
    with torch.no_grad():
        logits = model(input_ids=queries, memory=state, use_cache=False).logits
    errors["READ"] = _distance(logits, plain(inputs_embeds=inputs, use_cache=False).logits[:, MEMORY:])
    training = model.training
    model.eval()  # in training mode, checkpointed layers drop the cache, which generate refuses
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = model.generate(queries, memory=state, **options)
    model.train(training)
    inputs = torch.cat([memory.to(plain.dtype), plain.get_input_embeddings()(texts)], dim=1)
    found = plain(inputs_embeds=inputs, use_cache=False).logits[:, -NEW_TOKENS - 1 : -1].float()
    short = found.amax(-1) - found.gather(-1, texts[:, -NEW_TOKENS:, None])[..., 0]  # 0 where it is the first choice
    errors["generate"] = float((short / found.std(-1)).max())
    theirs = dict(plain.named_parameters())
    weights = [theirs[name].requires_grad_() for name in trained]
    for strategy in variant.meta_gradients:
        leaf, second_order = start.clone().requires_grad_(), 0 if strategy == "first_order" else None
        with sdpa_kernel(SDPBackend.MATH):
            written = textbook.write(plain, leaf, contexts, STEPS, LR, second_order_steps=second_order)
            outer = textbook.loss(plain, written, queries).mean()
            expected = torch.autograd.grad(outer, [leaf, *weights])
        model.peft_config["default"].meta_gradient = strategy
        model.zero_grad()
        model(input_ids=queries, labels=queries, context_input_ids=contexts).loss.backward()
        errors[strategy] = _distance(_flat([p.grad for p in (slots, *trained.values())]), _flat(expected))


def _tokens(length: int, model: PreTrainedModel) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length)).to(model.device)


def _distance(found: Tensor, expected: Tensor) -> float:
    """The relative distance, by norms; `inf` if something is not finite."""
    value = float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
    return value if value == value else float("inf")


def _flat(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([g.detach().double().flatten() for g in gradients if g is not None])


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def check_all(path: Path, names: Sequence[str] = (), show: Callable[[str], Any] = print) -> list[Record]:
    """Check variants and record the findings.

    Args:
        path (`Path`): the file of records.
        names (`Sequence[str]`, *optional*): only these. Defaults to all.
        show (`Callable`, *optional*): called with a line for each variant.

    Raises:
        ValueError: there is no such variant.
    """
    if unknown := set(names) - {variant.name for variant in VARIANTS}:
        known = "; ".join(variant.name for variant in VARIANTS)
        raise ValueError(f"There is no variant {', '.join(sorted(unknown))}; there are {known}.")
    records, before = [], {record.dataset for record in load_records(path)}
    for variant in (v for v in VARIANTS if not names or v.name in names):
        found = check(variant)
        show(f"{variant.name}: {found['verdict']} {found['reason']}")
        if found["verdict"] == "not run" and variant.name in before:
            continue  # left to a machine that has it
        metrics = {key: float(f"{x:.1e}") if x < float("inf") else None for key, x in found.pop("errors").items()}
        made_by = {library: version(library) for library in ("torch", "transformers", "peft", "accelerate")}
        if variant.needs is not None and (found["verdict"] != "not run") and "GPU" not in variant.needs:
            library = variant.needs.replace(".", "-")
            made_by[library] = version(library)
        records.append(Record("variants", "gradmem", dataset=variant.name, metrics=metrics, facts=found | made_by))
    add_records(path, records)
    return records
