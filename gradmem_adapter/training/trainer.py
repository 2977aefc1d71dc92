"""Meta-training with Transformers' Trainer: WRITE and READ in one pass, weighted correctly over batches and
processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.outputs import GradMemOutput
from gradmem_adapter.write.rates import write_lrs

from .arguments import with_defaults
from .batches import Batches, RowBatches
from .callbacks import EndByClock
from .checks import (
    check_arguments,
    check_datasets,
    check_model,
    check_own_optimizer,
    check_rows,
    limited_collator,
)
from .compiled import compiled_layers
from .cuda_graph import Batch, GraphedBackward, maskless_attention, own_stream
from .distillation import Distillation
from .evaluation import EvaluatingTrainer
from .metrics import Score, score_answer
from .optimizer import with_own_rates
from .schedule import multiply, own_schedule
from .sharding import check_sharding, shard_as_one, whole, whole_weights
from .sums import Count, Sums, batch_sums, context_length, count, in_order, model_inputs, write_lr_means


class GradMemTrainer(EvaluatingTrainer):
    """Transformers' Trainer for a model with a GradMem adapter.

    ```python
    trainer = GradMemTrainer(model, GradMemTrainingArguments("out", max_steps=1000), train_dataset=rows,
                             eval_dataset=held_out, processing_class=tokenizer)
    trainer.train()
    ```

    The loss of an optimizer step is the mean over all its target tokens, plus `reconstruction_weight` times the mean
    last write loss over all its contexts, however these are spread over micro-batches and processes. Evaluation reports
    the loss and, for greedy answers, `exact_match` and `f1`. Every checkpoint opens with `load_checkpoint`.

    Args:
        model (`PeftModel`): a model with an active, trainable GradMem adapter. Or, for comparison, any module with the
            `forward` of `GradMemModel`: only its trained weights are saved, and it is evaluated only by its loss.
        args (`TrainingArguments`): `GradMemTrainingArguments`, or Transformers' own.
        data_collator (*optional*): makes batches of rows (default: a `GradMemCollator`, which explains what a row is).
        train_dataset (*optional*): rows, or `Batches`, made on the device.
        eval_dataset (*optional*): rows, or several datasets by name.
        processing_class (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as for
            `Trainer`; predictions are the token ids of the answers with `predict_with_generate` in `args`, otherwise
            logits.
        score (`Score`, *optional*): scores an answer against its references, in place of exact match and F1.
        teacher (`nn.Module`, *optional*): a causal LM that reads the contexts as text; its distributions are additional
            targets, by `distillation_weight` and `distillation_temperature` of `args`. See `Distillation`.

    Raises:
        TypeError: the model has no active GradMem adapter.
        ValueError, NotImplementedError: the settings cannot work; the message says what to do.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        score: Score = score_answer,
        teacher: nn.Module | None = None,
    ) -> None:
        config = check_model(model)
        if processing_class is None:
            raise ValueError(
                "GradMemTrainer needs the tokenizer to make batches, decode answers and save checkpoints. Pass "
                "processing_class=tokenizer."
            )
        args = with_defaults(args)
        check_arguments(args, model, config)
        if args.cuda_graphs and type(self).compute_loss is not GradMemTrainer.compute_loss:
            raise ValueError(
                f"cuda_graphs=True does not call compute_loss, so the one of {type(self).__name__} would have no "
                "effect. Leave cuda_graphs out."
            )
        check_own_optimizer(args, optimizers[0])
        check_datasets(train_dataset, eval_dataset)
        collator = limited_collator(data_collator, processing_class, model, config)
        check_rows("train_dataset", train_dataset, collator)
        check_rows("eval_dataset", eval_dataset, collator)
        if args.cuda_graphs and train_dataset is not None and not isinstance(train_dataset, Batches):
            train_dataset = RowBatches.of(train_dataset, collator, args)
        super().__init__(
            config=config,
            score=score,
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), *([EndByClock()] if args.max_minutes is not None else [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the counts of get_batch_samples
        self.distillation: Distillation | None = None
        if teacher is not None:
            self.distillation = Distillation(teacher.to(args.device), model, args.distillation_temperature)
        self._window: Count | None = None
        self._graphed: GraphedBackward | None = None
        self._sums = Sums(args.device)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Otherwise Accelerate would compile the PeftModel as a whole, including the loop of WRITE.
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=DynamoBackend.NO)
        check_sharding(self.accelerator, self.args)
        if self.is_fsdp_enabled:
            shard_as_one(self.accelerator)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Autocast for FSDP2, where Accelerate does not wrap the forward pass of the model."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    @property
    def slots(self) -> MemorySlots | None:
        """The layer with the method's trained tensors; None if the model has none."""
        return None if self.config is None else cast(GradMemModel, cast(PeftModel, self.model).base_model).slots

    # ---------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `Trainer.train` does.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one in the output directory. None or
                False starts from the beginning; `has_checkpoint()` says whether there is one to resume from.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite; the message names the last good checkpoint. The
                weights are those before that step, or, with `cuda_graphs`, which checks only when the next log or
                checkpoint is due, those after it.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no checkpoint to resume from in {self.args.output_dir!r}. Pass "
                    "resume_from_checkpoint=trainer.has_checkpoint() to resume only if there is one."
                )
        self._begin(resume_from_checkpoint or None)
        self._sums = Sums(self.args.device)
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            # Transformers sets this; torch.compile also reads PyTorch's older setting and raises if the two differ.
            torch.set_float32_matmul_precision("high")
        with ExitStack() as stack:
            stack.callback(setattr, self, "_graphed", None)  # graphs hold the memory of a step
            if self.args.cuda_graphs and self.args.world_size > 1 and self.args.device.type == "cuda":
                stack.enter_context(own_stream(self.args.device))
            if self.args.torch_compile:
                static = isinstance(self.train_dataset, Batches)
                backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
                for model in (self.model, *([self.distillation.teacher] if self.distillation else [])):
                    stack.enter_context(compiled_layers(model, static=static, backend=backend, mode=mode))
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, Batches):
            return DataLoader(self.train_dataset, shuffle=False)  # only its length is used, see get_batch_samples
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """`"group_by_length"` uses the length of context texts, because rows have no `input_ids`."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(batch, lengths=[len(row["context"]) for row in rows])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of an optimizer step, and their number of target tokens over all processes."""
        if isinstance(self.train_dataset, Batches):
            first = self.state.global_step * self.args.gradient_accumulation_steps
            batches = [self.train_dataset.batch(first + i, device) for i in range(num_batches)]
        else:
            batches = list(islice(epoch_iterator, num_batches))
        counts = [torch.stack(count(batch, device)) for batch in batches]
        self._record(batches, device)
        total = torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.long, device=device)
        if self.args.average_tokens_across_devices:
            total = self.accelerator.gather(total[None]).sum(0)
        self._window = Count(*total)
        return batches, self._window.tokens

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.config is not None:
            self._trained_on(GradMemConfig.from_pretrained(resume_from_checkpoint).trained_length or 0)

    def _record(self, batches: list[Any], device: torch.device) -> None:
        """Record the length of contexts in the configuration, and remove a calibration, which belongs to other
        weights."""
        if self.config is None or not batches:
            return
        self.config.score_calibration = None
        if isinstance(self.train_dataset, Batches):
            self._trained_on(self.train_dataset.trained_length or 0)
        else:
            longest = torch.tensor([max(map(context_length, batches))], device=device)
            self._trained_on(int(self.accelerator.gather(longest).max()))

    def _trained_on(self, tokens: int) -> None:
        """Record that a context of this many tokens was trained on."""
        if self.config is not None and tokens:
            self.config.trained_length = max(self.config.trained_length or 0, tokens)

    def write_steps(self) -> int:
        """K of the current optimizer step: the same in all micro-batches and processes, and in a resumed run."""
        draw = random.Random(f"{self.args.seed}:{self.state.global_step}")
        return draw.choice(self.args.write_steps or [self.default_write_steps])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the loss of its optimizer step.

        Args:
            num_items_in_batch: None: the batch is a step by itself; otherwise, it is one of those last returned by
                `get_batch_samples`.
        """
        whole = None if num_items_in_batch is None else self._window
        loss, output, table = self._loss(model, {"write_steps": self.write_steps()} | inputs, whole)
        if model.training:
            self._sums.add(table)
        return (loss, output) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: Batch, whole: Count | None) -> tuple[Tensor, GradMemOutput, Tensor]:
        """The loss, the model's output, and a table of the logged values.

        Args:
            whole: the counts of targets and contexts of the optimizer step; None: those of this batch.
        """
        steps = inputs["write_steps"]
        if self.distillation is not None:
            with self.accelerator.autocast():
                inputs = self.distillation.teach(inputs)
        here = count(inputs, self.args.device)
        whole = here if whole is None else whole
        # The mean over no label is not a number, which would spoil the other micro-batches of the step.
        divisor = {} if self.slots is None else {"num_items_in_batch": here.tokens.clamp(min=1)}
        output: GradMemOutput = model(**model_inputs(inputs), write_steps=steps, **divisor)
        target_loss, losses = cast(Tensor, output.target_loss), output.write_losses
        loss = target_loss * (here.tokens / whole.tokens)
        if losses is None:  # a model without memory may add other terms
            loss = loss + (cast(Tensor, output.loss) - target_loss) * (here.contexts / whole.contexts)
        elif self.reconstruction_weight and losses.shape[1]:
            loss = loss + self.reconstruction_weight * losses[:, -1].sum() / whole.contexts
        sums = batch_sums(inputs, output, here, steps)
        if self.distillation is not None:
            with self.accelerator.autocast():
                divergence = self.distillation.divergence(output, inputs)
            loss = loss + self.args.distillation_weight * divergence / whole.tokens
            sums["distillation_loss"] = divergence
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, but their sum is needed
        return loss, output, in_order(sums)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.args.cuda_graphs:
            loss = self._graphed_step(inputs)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._sound[0] &= loss.isfinite()
        self._sound[2] &= cast(Count, self._window).tokens > 0
        if self.accelerator.sync_gradients and self.slots is not None:
            gradient = self.slots.gradmem_memory[cast(PeftModel, self.model).active_adapter].grad
            if gradient is not None:
                scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
                norm = whole(gradient.norm()) / scale
                counted = norm.isfinite()  # a gradient scaler skips the other steps
                self._sums.add(in_order({"memory_grad_norm": torch.where(counted, norm, 0), "steps": counted}))
        return loss

    def _graphed_step(self, inputs: dict[str, Any]) -> Tensor:
        """Forward and backward pass of a micro-batch in one launch. Runs in eval mode, as there is no dropout."""
        if self.model.training:
            self.model.eval()
        if self._graphed is None:
            weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self._graphed = GraphedBackward(self._passes, weights)
        whole = cast(Count, self._window)
        inputs = self._prepare_inputs({"write_steps": self.write_steps()} | inputs)
        with maskless_attention(self.model):  # also around the backward pass, which runs the model
            loss, table = self._graphed(inputs | {"all_tokens": whole.tokens, "all_contexts": whole.contexts})
        self._sums.add(table)
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            self._graphed.average()
        return loss

    def _passes(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """The captured computation: the loss, and the table of the logged values."""
        inputs = dict(inputs)
        whole = Count(inputs.pop("all_tokens"), inputs.pop("all_contexts"))
        loss, _, table = self._loss(self.model, inputs, whole)
        return loss, table

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Always 0: Transformers would count only the queries, and walk the whole model for it at every step."""
        return 0

    # ---------------------------------------------------------------- optimizer, schedule, log

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = with_own_rates(super().create_optimizer(model), self.model, self.args)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        own = own_schedule(self.optimizer if optimizer is None else optimizer, self.args, num_training_steps)
        if own is not None:
            self.lr_scheduler, self._created_lr_scheduler = own, True
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(self.train_dataset, Batches) and isinstance(scheduler, LambdaLR):
            multiply(scheduler, self.train_dataset.lr_factor)
        return scheduler

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients. Raises before the optimizer's step if it is not finite."""
        grad_norm = whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm)))
        # A gradient scaler (fp16) finds its scale from overflowing gradients, and skips those steps itself.
        if self.accelerator.scaler is None:
            self._sound[1] &= grad_norm.isfinite()
        if not self.args.cuda_graphs:
            self.check_finite()
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, in addition to the training loss, means of WRITE's metrics since the last log."""
        if "loss" in logs:
            self.check_finite()
            means = self._sums.means(self.accelerator)
            if self.distillation is None:
                means.pop("distillation_loss", None)
            logs = logs | means
            self._sums = Sums(self.args.device)
            if self.slots is not None and self.config is not None and self.config.learn_write_lr != "no":
                adapter = cast(PeftModel, self.model).active_adapter
                with whole_weights(self.slots):
                    rates = write_lrs(self.slots, adapter, self.config, steps=self.config.num_write_lrs)
                logs |= write_lr_means(rates)
        super().log(logs, start_time)
