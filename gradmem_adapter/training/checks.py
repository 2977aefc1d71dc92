"""Checks before training starts."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.naming import shared_config
from gradmem_adapter.utils.tokens import check_pad_token
from gradmem_adapter.utils.wording import counted

from .arguments import GradMemTrainingArguments
from .batches import Batches
from .collator import GradMemCollator, read_row
from .cuda_graph import check_no_dropout


def check_model(model: Any) -> GradMemConfig | None:
    """The config of the active GradMem adapter; None for a module that is trained without an adapter.

    Raises:
        TypeError: it is a language model without a GradMem adapter, or not a module.
        ValueError: nothing in it is trainable.
    """
    adapter = isinstance(model, PeftModel)
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel) or (
        adapter and not isinstance(model.active_peft_config, GradMemConfig)
    ):  # fmt: skip
        raise TypeError(
            f"GradMemTrainer needs a model with an active GradMem adapter, got {type(model).__name__}. Create one with "
            "get_peft_model(backbone, GradMemConfig(...)) or load_checkpoint(path, is_trainable=True)."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "Nothing in the model is trainable. Open an adapter with load_checkpoint(path, is_trainable=True), or give "
            "the model a lora_config."
        )
    return cast(GradMemConfig, model.active_peft_config) if adapter else None


def check_arguments(args: GradMemTrainingArguments, model: nn.Module, config: GradMemConfig | None) -> None:
    """Raise for arguments that cannot work, and correct those that would silently fail."""
    if args.push_to_hub and config is not None:
        shared_config(cast(PeftModel, model))
    if args.remove_unused_columns:
        warnings.warn(
            "remove_unused_columns=True would remove the contexts from the rows, so it is set to False, which is the "
            "default of GradMemTrainingArguments.",
            stacklevel=3,
        )
        args.remove_unused_columns = False
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not supported: the loss is the backbone's own. Set it to 0.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' counts tokens, but rows of texts have none yet. Use "
            "'group_by_length', which groups by the length of contexts."
        )
    if "loss" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics=['loss'] is not supported: evaluation sums the loss over tokens and contexts and "
            "reports it as eval_loss. Leave 'loss' out; 'inputs' are supported."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} devices and would split each batch over them, separating queries from "
            "their contexts. Start one process per device (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES."
        )
    if args.torch_compile and config is not None and config.meta_gradient == "exact":
        raise ValueError(
            "torch_compile cannot be combined with meta_gradient='exact', because compiled code cannot be "
            "differentiated twice. Use meta_gradient='finite_difference' or 'first_order', or leave torch_compile off."
        )
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches would split batches into equal parts, separating queries from their "
            "contexts. Leave it at None."
        )
    accelerator.dispatch_batches = False
    if args.max_minutes is not None and 0 < args.warmup_steps < 1:
        raise ValueError(
            f"warmup_steps={args.warmup_steps} is a share of the steps, but with max_minutes their number is unknown. "
            "Pass a number of steps."
        )
    checkpointing = "activation_checkpointing"
    if not hasattr(args, checkpointing):
        checkpointing = "gradient_checkpointing"  # its name in Transformers 5.17
    kwargs: Any = getattr(args, f"{checkpointing}_kwargs") or {}
    if kwargs.get("use_reentrant"):
        raise ValueError(
            "use_reentrant=True cannot be combined with write steps inside the forward pass. Leave it out."
        )
    setattr(args, f"{checkpointing}_kwargs", {"use_reentrant": False} | kwargs)
    if args.cuda_graphs:
        _check_graphs(args, model, getattr(args, checkpointing))


def check_own_optimizer(args: GradMemTrainingArguments, optimizer: object) -> None:
    """Raise if an optimizer was passed together with arguments for the trainer's own optimizer."""
    if optimizer is not None and (args.write_lr_factor != 1 or args.muon_lr_factor is not None):
        raise ValueError(
            "write_lr_factor and muon_lr_factor apply to the trainer's own optimizer, but another one was passed. "
            "Leave them out and give your optimizer such parameter groups, or pass optimizers=(None, scheduler)."
        )


def _check_graphs(args: GradMemTrainingArguments, model: nn.Module, checkpointing: bool) -> None:
    check_no_dropout(model)
    for name, there in (("fp16", args.fp16), ("gradient_checkpointing", checkpointing)):
        if there:
            raise ValueError(
                f"cuda_graphs=True cannot be combined with {name}=True. "
                + ("Use bf16=True." if name == "fp16" else "Leave one out: checkpointing saves memory, graphs time.")
            )


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Raise for a dataset without rows, and for evaluation on `Batches`, which have no texts to compare with."""
    if not isinstance(train_dataset, Batches) and hasattr(train_dataset, "__len__") and not len(train_dataset):
        raise ValueError("train_dataset has no rows. Leave it out if the trainer only evaluates.")
    parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(isinstance(part, Batches) for part in parts):
        raise TypeError(
            "eval_dataset must be rows of texts, not Batches, because generated answers are compared with texts."
        )


def check_rows(name: str, rows: Any, collator: Any) -> None:
    """Raise for a row of a list that is invalid or does not fit the backbone, rather than after hours of training.

    Only rows that may not fit are tokenized. The collator checks the others when they are drawn, and so it does the
    rows of other datasets, which may read or create them on demand.

    Args:
        name (`str`): what the rows are called in the message.
        rows (`Any`): several datasets by name, or one; checked if it is a list.
        collator (`Any`): checks the rows if it is a `GradMemCollator`.

    Raises:
        TypeError, ValueError: a row is invalid, or a context, or a query with its target, has too many tokens, or none;
            the message names the row.
    """
    if not isinstance(collator, GradMemCollator):
        return
    parts = {f"{name} {part!r}": values for part, values in rows.items()} if isinstance(rows, dict) else {name: rows}
    for part, values in parts.items():
        for place, row in enumerate(values if isinstance(values, list) else ()):
            if collator.may_not_fit(read_row(f"Row {place} of {name}", row)):
                try:
                    collator([row], first=place)
                except ValueError as error:
                    raise ValueError(f"{part}: {error}") from error


def limited_collator(
    collator: Any, tokenizer: PreTrainedTokenizerBase, model: nn.Module, config: GradMemConfig | None
) -> Any:
    """The collator, with the backbone's limits if it has none of its own."""
    if collator is None:
        collator = GradMemCollator(tokenizer, query_format="text" if config is None else config.query_format)
    if isinstance(collator, GradMemCollator) and config is not None:
        if collator.query_format != config.query_format:
            raise ValueError(
                f"The collator has query_format={collator.query_format!r}, but the adapter's config has "
                f"{config.query_format!r}, so training and inference would differ. Give both the same query_format."
            )
        check_pad_token(collator.tokenizer, model)
        tuner = cast(GradMemModel, cast(PeftModel, model).base_model)
        if tuner.positions is not None:
            limit = tuner.positions - tuner.prefix_length
            if limit < 1:
                raise ValueError(
                    f"The memory takes {counted(tuner.prefix_length, 'position')}, but the model has only "
                    f"{tuner.positions}. Use fewer memory or control tokens."
                )
            collator = copy.copy(collator)  # the caller may use theirs with another model
            collator.max_context_length = limit if collator.max_context_length is None else collator.max_context_length
            collator.max_query_length = limit if collator.max_query_length is None else collator.max_query_length
    return collator
