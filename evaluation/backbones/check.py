"""Check one type of causal LM, tiny and with random weights: the adapter must be right on it, or refuse to attach."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from evaluation.backbones.reference import Reference, flat
from evaluation.backbones.tiny_configs import FIRST_TOKEN, LAST_TOKEN, tiny_config
from gradmem_adapter import GradMemConfig
from gradmem_adapter.ops.padding import pad

MEMORY, STEPS, NEW_TOKENS = 3, 2, 4
CONTEXTS, QUERIES = (9, 6), (5, 3)
"""Lengths of the rows of a batch."""
BOUNDS = dict.fromkeys(("exact", "first_order", "none"), 5e-3) | {"finite_difference": 0.1}
"""Bounds of relative errors in float32 for each meta-gradient; 5e-3 also for everything else."""
DRAWS = 8
"""If finite differences are off, they are tried with other vectors and texts. Right code is right on some of these: a
kink lies between two points only by chance."""


class Refused(Exception):
    """The adapter refused to attach to the backbone."""


class NotDifferentiable(Exception):
    """Plain autograd cannot compute the gradient either."""


def check(model_type: str) -> dict[str, Any]:
    """The findings for a type: `verdict` ("passes", "refused", "limit", "wrong" or "crashes"), `reason`, `model` (its
    class) and `errors` by name."""
    errors: dict[str, float] = {}
    try:
        backbone = tiny_model(model_type)
    except Exception as problem:
        return {"verdict": "limit", "reason": f"cannot be built: {said(problem)}", "model": "", "errors": errors}
    verdict, reason = "passes", ""
    try:
        limits, notes = compare(backbone, errors)
        wrong = [name for name, value in errors.items() if not value <= BOUNDS.get(name.partition(",")[0], 5e-3)]
        if wrong:
            verdict, reason = "wrong", ", ".join(f"{name} {errors[name]:.1e}" for name in wrong)
        else:
            verdict, reason = "limit" if limits else "passes", "; ".join(dict.fromkeys(limits or notes))
    except Refused as problem:
        verdict, reason = "refused", str(problem)
    except Exception as problem:
        limit = plain_problem(backbone)
        verdict, reason = ("limit", limit) if limit else ("crashes", said(problem))
    return {"verdict": verdict, "reason": reason, "model": type(backbone).__name__, "errors": errors}


def tiny_model(model_type: str) -> PreTrainedModel:
    """A model in eval mode whose predictions vary with its input."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    model = kind(next((part for part in parts if type(part) is kind.config_class), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.endswith(("weight", "_proj")):
                parameter.mul_(3)
            elif parameter.is_floating_point():  # zeros and ones would hide errors
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return cast(PreTrainedModel, model.eval())


def said(problem: Exception) -> str:
    """An exception as one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def texts(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    """Rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(FIRST_TOKEN, LAST_TOKEN, (length,), generator=generator) for length in lengths]


def batch(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """Rows as a batch, in the form that a tokenizer returns."""
    return dict(zip(("input_ids", "attention_mask"), pad(rows, side), strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error, by norms."""
    value = (found.detach().double() - expected.detach().double()).norm() / expected.detach().norm().clamp(min=1e-12)
    return float(value) if value.isfinite() else float("inf")


class Rows(NamedTuple):
    """What is written and read: M_0 `[m, d]`, contexts and queries."""

    start: Tensor
    contexts: list[Tensor]
    queries: list[Tensor]

    @classmethod
    def drawn(cls, seed: int, width: int, scale: float) -> Rows:
        """Random rows."""
        start = scale * torch.randn(MEMORY, width, generator=torch.Generator().manual_seed(seed))
        return cls(start, texts(CONTEXTS, 2 * seed), texts(QUERIES, 2 * seed + 1))


def attached(backbone: PreTrainedModel, lr: float, **config: Any) -> Any:
    """A copy of the backbone with the adapter."""
    fields: dict[str, Any] = {"num_memory_tokens": MEMORY, "write_steps": STEPS, "write_lr": lr, **config}
    try:
        return get_peft_model(copy.deepcopy(backbone), GradMemConfig(**fields)).eval()
    except (TypeError, ValueError, NotImplementedError) as problem:
        raise Refused(" ".join(str(problem).split())) from problem


def set_start(model: Any, start: Tensor) -> None:
    """Give the model its memory slots."""
    with torch.no_grad():
        model.base_model.slots.gradmem_memory["default"].copy_(start)


def lora_for(backbone: PreTrainedModel) -> LoraConfig:
    """A LoRA on every linear layer that PEFT alone supports."""
    special = {
        name.rpartition(".")[2]
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear  # Llama 4's router: tuples
    }
    for excluded in (None, ["out_proj"], sorted(special)):  # PEFT refuses Mamba's out_proj
        options: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": excluded}
        lora = LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, **options)
        try:
            get_peft_model(copy.deepcopy(backbone), lora)(input_ids=torch.stack(texts((5, 5), 3)))
            break
        except (ValueError, AttributeError):
            continue
    return lora


def compare(backbone: Any, errors: dict[str, float]) -> tuple[list[str], list[str]]:
    """Measure the errors of everything that the adapter does, into `errors`. Returns limits, which plain autograd has
    as well, and notes."""
    width = attached(backbone, 1.0).base_model.slots.gradmem_memory["default"].shape[1]
    scale = float(backbone.get_input_embeddings()(torch.arange(FIRST_TOKEN, LAST_TOKEN)).detach().std())
    rows = Rows.drawn(0, width, scale)
    step = Reference(copy.deepcopy(backbone), 1.0, 1).write(rows.start, rows.contexts[0]) - rows.start
    lr = float(0.3 * rows.start.norm() / step.norm())  # the first step is as long as a third of the memory
    limits: list[str] = []
    notes: list[str] = []
    crossing: dict[str, int] = {}
    side, lora = "left", lora_for(backbone)
    for kind, config in (("LoRA", {"lora_config": lora}), ("all weights", {"train_backbone": True})):
        model, copied = attached(backbone, lr, **config), copy.deepcopy(backbone)
        copied = get_peft_model(copied, lora).get_base_model() if kind == "LoRA" else copied
        weights = model.get_base_model().state_dict()
        copied.load_state_dict({name: value for name, value in weights.items() if "gradmem" not in name})
        reference = Reference(copied.eval(), lr, STEPS)
        if kind == "LoRA":
            side = compare_states(model, reference, rows, errors, limits)
            notes += ["takes no prompts that are padded on the left"] * (side == "right")
        for strategy, bound in BOUNDS.items():
            name = f"{strategy}, {kind}"
            try:
                errors[name] = gradient_error(model, reference, rows, side, strategy)
            except NotDifferentiable as problem:
                limits.append(f"{'exact' if strategy == 'finite_difference' else strategy} gradient: {problem}")
            seeds = iter(range(1, DRAWS))
            while strategy == "finite_difference" and errors.get(name, 0.0) > bound and (seed := next(seeds, 0)):
                errors[name] = gradient_error(model, reference, Rows.drawn(seed, width, scale), side, strategy)
                crossing[kind] = seed
    notes += [f"finite differences cross kinks: right in draw {seed + 1} ({kind})" for kind, seed in crossing.items()]
    return limits, notes


def compare_states(model: Any, reference: Reference, rows: Rows, errors: dict[str, float], limits: list[str]) -> str:
    """Compare WRITE, READ, generate, reconstruct and fidelity; returns the side on which queries may be padded."""
    start, contexts, queries = rows
    set_start(model, start)
    state = model.write(**batch(contexts))
    memory = [reference.write(start, context) for context in contexts]
    errors["write"] = error(state.vectors - start, torch.stack(memory) - start)
    side, options = "left", {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    try:
        logits = model(**batch(queries), memory=state).logits
        new = list(model.generate(**batch(queries), memory=state, **options)[:, -NEW_TOKENS:])
    except NotImplementedError:
        side = "right"
        logits = model(**batch(queries, side), memory=state).logits
        new = [model.generate(q[None], memory=state[i], **options)[0, -NEW_TOKENS:] for i, q in enumerate(queries)]
    recited, shares = model.reconstruct(state, NEW_TOKENS), model.fidelity(state, **batch(contexts)).teacher_forced
    for i, (context, query) in enumerate(zip(contexts, queries, strict=True)):
        of_query = logits[i, -len(query) :] if side == "left" else logits[i, : len(query)]
        choices = reference.logits(memory[i], context)[:-1].argmax(-1)
        differences = {
            "read": error(of_query, reference.logits(memory[i], query)[1:]),
            "generate": float((new[i] != reference.decode(memory[i], query, NEW_TOKENS)).any()),
            "reconstruct": float((recited[i] != reference.decode(memory[i], query[:0], NEW_TOKENS)).any()),
            "fidelity": abs(float(shares[i]) - float((choices == context).float().mean())),
        }
        errors |= {name: max(errors.get(name, 0.0), value) for name, value in differences.items()}
    if errors["generate"] and side == "left":
        embed = reference.backbone.get_input_embeddings()
        inputs, mask = pad(
            [torch.cat([m, embed(query)]).detach() for m, query in zip(memory, queries, strict=True)], side
        )
        plain = reference.backbone.generate(inputs_embeds=inputs, attention_mask=mask, **options)
        if torch.equal(plain, torch.stack(new)):
            limits.append("its own generate() gives other tokens than its forward pass for such a batch")
            errors["generate"] = 0.0
    return side


def gradient_error(model: Any, reference: Reference, rows: Rows, side: str, strategy: str) -> float:
    """The relative error of the outer gradients for all trained weights."""
    trained = {name: value for name, value in model.get_base_model().named_parameters() if value.requires_grad}
    inputs = [trained.pop(next(name for name in trained if "gradmem_memory" in name)), *trained.values()]
    theirs = dict(reference.backbone.named_parameters())
    weights = [theirs[name].requires_grad_() for name in trained]
    truth = "exact" if strategy == "finite_difference" else strategy
    try:
        expected = reference.outer_gradients(*rows, weights, truth)
    except RuntimeError as problem:
        raise NotDifferentiable(said(problem)) from problem
    if not expected.isfinite().all():
        raise NotDifferentiable("not finite")
    context, query = batch(rows.contexts), batch(rows.queries, side)
    set_start(model, rows.start)
    model.peft_config["default"].meta_gradient = strategy
    model.zero_grad()
    model(
        **query, labels=query["input_ids"].masked_fill(query["attention_mask"] == 0, -100),
        context_input_ids=context["input_ids"], context_attention_mask=context["attention_mask"],
    ).loss.backward()  # fmt: skip
    return error(flat(inputs, [x.grad for x in inputs]), expected)


def plain_problem(backbone: Any) -> str | None:
    """Why the backbone itself, without an adapter, cannot do what memory needs; `None`: it can."""
    prompt = texts((8,), 3)[0][None]
    try:
        embeddings = backbone.get_input_embeddings()(prompt)
        backbone(inputs_embeds=embeddings).logits.logsumexp(-1).sum().backward()
        backbone.generate(prompt, max_new_tokens=2, do_sample=False)
    except Exception as problem:
        return said(problem)
    return None
