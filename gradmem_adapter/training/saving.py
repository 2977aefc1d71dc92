"""Checkpoints during training; they never hold weights that are not finite."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradmem_adapter.card import Card, write_card
from gradmem_adapter.checkpoint import load_weights, save_beside
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.naming import saved_config, shared_config
from gradmem_adapter.utils.files import errors_named, replacing
from gradmem_adapter.utils.temporary import temporary_directory

from .pushing import PushingTrainer
from .sharding import whole_weights
from .sums import NO_TARGETS
from .weights import load_trained_weights, save_trained_weights, trained_weights


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight is no longer finite. The message names the last good checkpoint, if there is one."""


class SavingTrainer(PushingTrainer):
    """The part of `GradMemTrainer` that saves and resumes; it is not used by itself. Args: as for `PushingTrainer`."""

    model: nn.Module
    processing_class: PreTrainedTokenizerBase

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._begin()

    def _begin(self, checkpoint: str | None = None) -> None:
        """Reset for a new run, or one that resumes from a checkpoint."""
        self._good = checkpoint
        """The checkpoint that this run last saved or resumes from; the directory may also hold those of another run."""
        self._sound = torch.tensor([True, True, True], device=self.args.device)
        """Whether so far all losses and all gradients are finite, and every optimizer step had a target token."""

    def check_finite(self) -> None:
        """Raise `TrainingDiverged` in all processes if a loss or a gradient of one of them was not finite, or
        `ValueError` if that is because a step had no target token."""
        losses, gradients, labels = self.accelerator.gather(self._sound[None]).all(0).tolist()
        if not labels:
            raise ValueError(f"An optimizer step {NO_TARGETS}")
        if not (losses and gradients):
            what = f"The {'gradient' if losses else 'loss'} is not finite "
            # With CUDA graphs, steps are not checked one by one, because that would wait for the GPU.
            self._diverged(
                f"{what}since the last log, at step {self.state.global_step}. The weights cannot be used any more"
                if self.args.cuda_graphs
                else f"{what}in step {self.state.global_step + 1}. The weights have not been changed by that step"
            )

    def _diverged(self, what: str) -> None:
        raise TrainingDiverged(
            f"{what}. "
            + (f"The last good checkpoint is {self._good!r}. " if self._good else "There is no checkpoint yet. ")
            + "Try a lower learning rate (or a longer warmup), a lower write_lr, or write_clip_norm in GradMemConfig."
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, completely or not at all."""
        self.check_finite()
        run = Path(self._get_output_dir(trial))
        there = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with errors_named(there), ExitStack() as stack:
            folder = None
            if self.args.should_save:
                run.mkdir(parents=True, exist_ok=True)
                folder = str(stack.enter_context(temporary_directory(run)))
            self._unfinished = broadcast_object_list([folder])[0]  # the same folder for all processes
            stack.callback(setattr, self, "_unfinished", None)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            saved = Path(cast(str, self._unfinished)) / there.name
            if self.state.best_model_checkpoint == str(saved):
                self.state.best_model_checkpoint = str(there)
            if self.args.should_save:
                self.state.save_to_json(str(saved / TRAINER_STATE_NAME))
                self._put_in_place(saved, there)
            self.accelerator.wait_for_everyone()
        self._good = str(there)
        if self.args.push_to_hub:
            self._push_from_checkpoint(self._good)

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _put_in_place(self, saved: Path, there: Path) -> None:
        """Move a checkpoint into place, and surplus checkpoints into the temporary folder.

        They are deleted with that folder, so a killed process leaves no partial checkpoint.
        """
        if there.exists():  # from an earlier run
            there.rename(saved.with_name("replaced"))
        saved.rename(there)
        all_of_them = [path for path in there.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
        kept = {str(there), self.state.best_model_checkpoint}
        old = sorted((path for path in all_of_them if str(path) not in kept), key=lambda path: path.stat().st_mtime)
        for path in old[: max(0, len(all_of_them) - (self.args.save_total_limit or len(all_of_them)))]:
            path.rename(saved.with_name(path.name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (and the backbone, if it is trained) for `load_checkpoint`."""
        with whole_weights(self.model):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the files of `save_checkpoint` next to those that Transformers keeps in the same directory."""
        for name, weight in trained_weights(self.model).items():
            if not weight.isfinite().all():
                self._diverged(
                    f"Weight {name!r} is not finite after step {self.state.global_step}, so nothing was saved"
                )
        if not self.args.should_save:
            return
        output_dir = output_dir or cast(str, self.args.output_dir)
        if self.config is not None:
            save_beside(cast(PeftModel, self.model), self.processing_class, output_dir, config=self._saved_config())
        else:
            save_trained_weights(self.model, output_dir)
            self.processing_class.save_pretrained(output_dir)
        with replacing(Path(output_dir) / TRAINING_ARGS_NAME) as temporary:
            torch.save(self.args, temporary)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card with the latest evaluation into the output directory; called by `push_to_hub`.

        Args:
            args, kwargs: as for `Trainer`; only `license`, `model_name` and `dataset` are used.
        """
        if self.config is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            measured = [entry for entry in self.state.log_history if "eval_loss" in entry]
            results = {name: value for name, value in (measured or [{}])[-1].items() if name.startswith("eval_")}
            name, data = self.hub_model_id or kwargs.get("model_name"), kwargs.get("dataset")
            data = data if isinstance(data, str | None) else ", ".join(data)
            card = Card(name, data, results, kwargs.get("license"))
            write_card(Path(cast(str, self.args.output_dir)), self._saved_config(), card)

    def _saved_config(self) -> GradMemConfig:
        named = shared_config if self._shared or self.args.push_to_hub else saved_config
        return named(cast(PeftModel, self.model))

    def _load_weights(self, path: str) -> None:
        with whole_weights(self.model, keep=True):
            if self.config is not None:
                load_weights(cast(PeftModel, self.model), path)
            else:
                load_trained_weights(self.model, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_weights(cast(str, self.state.best_model_checkpoint))

    def has_checkpoint(self) -> bool:
        """Whether the output directory has a checkpoint to resume from."""
        return self._last_checkpoint() is not None

    def _last_checkpoint(self) -> str | None:
        """The last complete checkpoint in the output directory. The trainer state is written last, so it marks a
        complete one."""
        found = {
            int(path.name.rpartition("-")[2]): str(path)
            for path in Path(cast(str, self.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if path.name.rpartition("-")[2].isdigit() and (path / TRAINER_STATE_NAME).is_file()
        }
        return max(found.items(), default=(0, None))[1]
