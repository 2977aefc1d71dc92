"""Meta-training with Transformers' Trainer: WRITE and READ in one pass, counted right over batches and processes."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from gradmem_adapter.checkpoint import load_weights, save_beside
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.state import MemoryState

from .arguments import GradMemTrainingArguments, with_defaults
from .collator import GradMemCollator
from .curriculum import Curriculum, Plan
from .errors import TrainingDiverged
from .metrics import Score, score_answer
from .statistics import Count, Sums, batch_sums, context_index, context_sums, count, means, model_inputs, per_context

SPARE_TOKENS = 8
"""How many more tokens than the longest target an answer may have in evaluation."""


class GradMemTrainer(Trainer):
    """Transformers' Trainer for a model with a GradMem adapter.

    ```python
    trainer = GradMemTrainer(model, GradMemTrainingArguments("out", max_steps=1000), train_dataset=rows,
                             eval_dataset=held_out, processing_class=tokenizer)
    trainer.train()
    ```

    The loss of an optimizer step is the mean over all its target tokens, plus `reconstruction_weight` times the mean
    last write loss over all its contexts, however they are spread over micro-batches and processes. Evaluation reports
    the loss and, from greedy answers, `exact_match` and `f1`. Every checkpoint opens with `load_checkpoint`.

    Args:
        model: a `PeftModel` with an active GradMem adapter that is trainable.
        args: `GradMemTrainingArguments`, or Transformers' own.
        data_collator: makes batches of rows (default: a `GradMemCollator`, which says what a row is).
        train_dataset: rows, or a `Curriculum`.
        eval_dataset: rows, or several datasets by name.
        processing_class: the backbone's tokenizer.
        callbacks, optimizers, optimizer_cls_and_kwargs: as for `Trainer`.
        score: scores an answer against its references, in place of exact match and F1.

    Raises:
        TypeError: the model has no active GradMem adapter.
        ValueError, NotImplementedError: settings that cannot work; the message says what to do.
    """

    model: PeftModel
    args: GradMemTrainingArguments
    processing_class: PreTrainedTokenizerBase
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        score: Score = score_answer,
    ) -> None:
        config = _check_model(model)
        if processing_class is None:
            raise ValueError(
                "GradMemTrainer needs the tokenizer to make batches, to read answers and for checkpoints: pass "
                "processing_class=tokenizer."
            )
        args = with_defaults(args)
        _check_arguments(args, config)
        if isinstance(train_dataset, Curriculum):
            _take_steps(args, train_dataset)
        tuner = cast(GradMemModel, model.base_model)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collator(data_collator, processing_class, config, tuner),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError(
                "GradMemTrainer works with one process per device (DDP), not with FSDP or DeepSpeed: WRITE runs the "
                "backbone inside the backward pass, where sharded weights are not gathered."
            )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by what get_batch_samples counts
        self.score = score
        self._window: Count | None = None
        self._losses_finite = torch.tensor(True, device=args.device)
        self._sums = Sums(args.device)
        self._eval_sums: dict[str, float] = {}
        self._new_tokens = 0
        if args.torch_compile:
            # In place and the inner model alone: WRITE and READ both run it, and the PeftModel around it keeps its
            # methods and the names of its weights.
            backbone = cast(PreTrainedModel, model.get_base_model())
            backbone.base_model.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Otherwise it would compile the PeftModel as a whole, the loop of WRITE included.
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=DynamoBackend.NO)

    @property
    def tuner(self) -> GradMemModel:
        return cast(GradMemModel, self.model.base_model)

    @property
    def config(self) -> GradMemConfig:
        return cast(GradMemConfig, self.model.active_peft_config)

    # ---------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `Trainer.train` does.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last whole one in the output directory.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite; the weights are those before that step.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint to resume from in {self.args.output_dir!r}.")
        self._sums = Sums(self.args.device)
        self._losses_finite = torch.tensor(True, device=self.args.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, Curriculum):
            return super().get_train_dataloader()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self._get_dataloader(
            dataset=self.train_dataset.plan(self.get_total_train_batch_size(self.args), seed),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda plan: SequentialSampler(cast(Plan, plan)),
            is_training=True,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of an optimizer step, and the target tokens in them over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        total = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            total += torch.stack(count(batch, device))
        if self.args.average_tokens_across_devices:
            total = self.accelerator.gather(total[None]).sum(0)
        self._window = Count(*total)
        return batches, self._window.tokens

    def write_steps(self) -> int:
        """K of the current optimizer step, the same in all its micro-batches and processes, and in a resumed run."""
        low, high = self.args.min_write_steps, self.args.max_write_steps
        low, high = (self.config.write_steps if value is None else value for value in (low, high))
        step = self.state.global_step
        if isinstance(self.train_dataset, Curriculum):
            stage = self.train_dataset.stages[self.train_dataset.stage_at(step)]
            low, high = stage.write_steps or (low, high)
        return random.Random(f"{self.args.seed}:{step}").randint(low, high)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the loss of its optimizer step.

        Args:
            num_items_in_batch: None: the batch is a step of its own; otherwise it is one of those that
                `get_batch_samples` gave last.
        """
        steps = self.write_steps()
        output: GradMemOutput = model(**model_inputs(inputs), write_steps=steps)
        here = count(inputs, self.args.device)
        whole = here if num_items_in_batch is None or self._window is None else self._window
        losses = cast(Tensor, output.write_losses)
        loss = cast(Tensor, output.target_loss) * (here.tokens / whole.tokens)
        if self.config.reconstruction_weight and losses.shape[1]:
            loss = loss + self.config.reconstruction_weight * losses[:, -1].sum() / whole.contexts
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of the gradients, we need their sum
        if model.training:
            self._sums.add(batch_sums(output, here, steps))
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses_finite = self._losses_finite & loss.isfinite()
        gradient = self.tuner.slots.gradmem_memory[self.model.active_adapter].grad
        if self.accelerator.sync_gradients and gradient is not None:
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            norm = gradient.norm() / scale
            counted = norm.isfinite()  # a scaler skips the other steps
            self._sums.add({"memory_grad_norm": torch.where(counted, norm, 0), "steps": counted})
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients, before the optimizer's step; which there is none of where it is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses = bool(self.accelerator.gather(self._losses_finite[None]).all())
        # A gradient scaler (fp16) finds its scale by gradients that overflow, and skips their steps itself.
        gradients = self.accelerator.scaler is not None or bool(torch.as_tensor(grad_norm).isfinite())
        if not (losses and gradients):
            self._diverged(f"The {'gradient' if losses else 'loss'} is not finite in step {self.state.global_step + 1}")
        return grad_norm

    def _diverged(self, what: str) -> NoReturn:
        last = self._last_checkpoint(self.state.global_step)
        raise TrainingDiverged(
            f"{what}. The weights have not been changed by that step. "
            + (f"The last good checkpoint is {last!r}. " if last else "There is no checkpoint yet. ")
            + "Try a lower learning rate (or a longer warmup), a lower write_lr, or write_clip_norm in GradMemConfig."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the training loss, log what WRITE did on average since the last time."""
        if "loss" in logs:
            logs = logs | self._sums.means(self.accelerator)
            self._sums = Sums(self.args.device)
            write_lrs = self.tuner.slots.write_lrs(self.model.active_adapter, steps=self.config.num_write_lrs)
            if write_lrs is not None:
                several, means = len(write_lrs) > 1, write_lrs.flatten(1).mean(1) if write_lrs.dim() > 1 else write_lrs
                logs |= {f"write_lr_{k}" if several else "write_lr": lr for k, lr in enumerate(means.tolist())}
            if isinstance(self.train_dataset, Curriculum):
                logs["stage"] = self.train_dataset.stage_at(self.state.global_step - 1)
        super().log(logs, start_time)

    # ---------------------------------------------------------------- evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate: losses and, with `predict_with_generate`, the scores of greedy answers, each a mean over all rows.

        Answers are read from memory that is written once per context.
        """
        self._eval_sums = {}
        self._new_tokens = self._max_new_tokens(dataloader.dataset)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        if not self._eval_sums:
            raise ValueError("The dataset to evaluate on has no rows.")
        found = means(self._eval_sums)
        loss = found["target_loss"] + self.config.reconstruction_weight * found.get("last_write_loss", 0.0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in ({"loss": loss} | found).items()}
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def _max_new_tokens(self, dataset: Any) -> int:
        if self.args.generation_max_new_tokens is not None or not self.args.predict_with_generate:
            return self.args.generation_max_new_tokens or 0
        collator = self.data_collator
        if not isinstance(collator, GradMemCollator) or isinstance(dataset, IterableDataset):
            raise ValueError(
                "How long an answer may be cannot be told from an iterable dataset or with a collator of your own: set "
                "generation_max_new_tokens."
            )
        return SPARE_TOKENS + max((collator.longest_target(dataset[i]) for i in range(len(dataset))), default=0)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Add a batch to the sums of the evaluation: those of each context by itself, so that the contexts which fill
        up the last batch of several processes can be left out."""
        inputs = self._prepare_inputs(inputs)
        steps = self.config.write_steps if self.args.eval_write_steps is None else self.args.eval_write_steps
        with torch.no_grad(), self.compute_loss_context_manager():
            output: GradMemOutput = model(**model_inputs(inputs), write_steps=steps)
            values = context_sums(inputs, output, steps)
            if self.args.predict_with_generate:
                with self.accelerator.autocast():
                    answers = self._answers(inputs, cast(Tensor, output.memory))
                scores = self._scores(inputs, answers)
                if taken := scores.keys() & {"loss", *values}:
                    raise ValueError(
                        f"The score may not be named {', '.join(sorted(taken))}: that is reported already."
                    )
                values |= scores
        table = self.accelerator.gather_for_metrics(torch.stack(list(values.values()), dim=1))
        for name, value in zip(values, table.double().sum(0).tolist(), strict=True):
            self._eval_sums[name] = self._eval_sums.get(name, 0.0) + value
        return None, None, None

    def _answers(self, inputs: dict[str, Any], memory: Tensor) -> list[str]:
        """The greedy answer to each query of a batch, read from memory [C, m, d]."""
        lengths = inputs["context_attention_mask"].sum(1)
        queries = inputs["query_input_ids"]
        sequences = self.model.generate(
            queries,
            attention_mask=inputs["query_attention_mask"],
            memory=MemoryState(memory, lengths, memory.new_zeros(len(memory), 1), fingerprint=""),
            strict=False,  # it was written a moment ago
            context_index=context_index(inputs),
            max_new_tokens=self._new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.processing_class.pad_token_id,
        )
        return self.processing_class.batch_decode(sequences[:, queries.shape[1] :], skip_special_tokens=True)

    def _scores(self, inputs: dict[str, Any], answers: list[str]) -> dict[str, Tensor]:
        scores = [self.score(answer, references) for answer, references in zip(answers, inputs["targets"], strict=True)]
        if any(score.keys() != scores[0].keys() for score in scores):
            raise ValueError("The score must return the same names for every answer.")
        device = inputs["input_ids"].device
        return {
            name: per_context(torch.tensor([float(score[name]) for score in scores], device=device), inputs)
            for name in sorted(scores[0])
        }

    # ---------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what `save_checkpoint` writes, beside the files that Transformers keeps in the same directory."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise TrainingDiverged(
                    f"Weight {name!r} is not finite after step {self.state.global_step}; nothing was saved. The last "
                    f"checkpoint is {self._last_checkpoint(self.state.global_step)!r}."
                )
        if self.args.should_save:
            output_dir = output_dir or cast(str, self.args.output_dir)
            save_beside(self.model, self.processing_class, output_dir)
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(self.model, cast(str, self.state.best_model_checkpoint))

    def has_checkpoint(self) -> bool:
        """Whether there is one in the output directory to resume from."""
        return self._last_checkpoint() is not None

    def _last_checkpoint(self, step: int | None = None) -> str | None:
        """The last checkpoint in the output directory (up to a step) that is whole: the state is written last."""
        found = {
            int(path.name.rpartition("-")[2]): str(path)
            for path in Path(cast(str, self.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if path.name.rpartition("-")[2].isdigit() and (path / TRAINER_STATE_NAME).is_file()
        }
        return max(((n, path) for n, path in found.items() if step is None or n <= step), default=(0, None))[1]


# -------------------------------------------------------------------- what is refused


def _check_model(model: Any) -> GradMemConfig:
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, GradMemConfig):
        raise TypeError(
            f"GradMemTrainer needs a model with an active GradMem adapter, got {type(model).__name__}. Make one with "
            "get_peft_model(backbone, GradMemConfig(...)) or load_checkpoint(path, is_trainable=True)."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "Nothing in the model is trainable. Open the adapter with load_checkpoint(path, is_trainable=True)."
        )
    return model.active_peft_config


def _check_arguments(args: GradMemTrainingArguments, config: GradMemConfig) -> None:
    """Refuse what cannot work, and put right what would go wrong unseen."""
    if args.remove_unused_columns:
        warnings.warn(
            "remove_unused_columns=True would take the contexts out of the rows, and the model would train without "
            "them; it is set to False. GradMemTrainingArguments has that as its default.",
            stacklevel=3,
        )
        args.remove_unused_columns = False
    low, high = (
        config.write_steps if value is None else value for value in (args.min_write_steps, args.max_write_steps)
    )
    if low > high:
        raise ValueError(
            f"K would be drawn from {low} to {high}; what is None is the config's write_steps, {config.write_steps}. "
            "Set both min_write_steps and max_write_steps."
        )
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not supported: the loss is the backbone's own. Set it to 0.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} devices and would split each batch over them, contexts and queries by the "
            "same rule. Start one process per device (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES."
        )
    if args.torch_compile and config.meta_gradient == "exact":
        raise ValueError(
            "torch_compile does not go with meta_gradient='exact': compiled code cannot be differentiated twice. "
            "Choose meta_gradient='finite_difference' or 'first_order', or leave torch_compile off."
        )
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches cuts finished batches into equal parts, contexts and queries by the "
            "same rule. Leave it at None."
        )
    accelerator.dispatch_batches = False
    checkpointing = "activation_checkpointing_kwargs"
    if not hasattr(args, checkpointing):
        checkpointing = "gradient_checkpointing_kwargs"  # as it was called in Transformers 5.17
    kwargs: Any = getattr(args, checkpointing) or {}
    if kwargs.get("use_reentrant"):
        raise ValueError("use_reentrant=True does not go with write steps inside the forward pass; leave it out.")
    setattr(args, checkpointing, {"use_reentrant": False} | kwargs)


def _take_steps(args: TrainingArguments, curriculum: Curriculum) -> None:
    if args.max_steps <= 0:
        args.max_steps = curriculum.steps
    if args.max_steps > curriculum.steps:
        raise ValueError(
            f"max_steps is {args.max_steps}, and the curriculum ends after {curriculum.steps} steps. Leave max_steps "
            "out, or make a stage longer."
        )
    if cast(Any, args.accelerator_config).split_batches:
        raise ValueError("A curriculum counts the rows of a step over all processes; leave split_batches off.")
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=True would start a resumed curriculum at its first stage; leave it off.")


def _collator(collator: Any, tokenizer: PreTrainedTokenizerBase, config: GradMemConfig, tuner: GradMemModel) -> Any:
    """The collator, with the limits of the backbone where it has none."""
    if collator is None:
        collator = GradMemCollator(tokenizer, query_format=config.query_format)
    if isinstance(collator, GradMemCollator):
        if collator.query_format != config.query_format:
            raise ValueError(
                f"The collator presents queries as {collator.query_format!r} and the adapter's config as "
                f"{config.query_format!r}: training and inference would not agree. Give both the same query_format."
            )
        positions = tuner.positions
        if positions is not None:
            limit = positions - tuner.prefix_length
            collator = copy.copy(collator)  # the caller's may go to another model, too
            collator.max_context_length = limit if collator.max_context_length is None else collator.max_context_length
            collator.max_query_length = limit if collator.max_query_length is None else collator.max_query_length
    return collator
