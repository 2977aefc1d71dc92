"""Pushes checkpoints to the hub during and after training, each replacing the previous one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from huggingface_hub import upload_folder
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from gradmem_adapter.checkpoint import OWN, OWN_PATTERNS
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.naming import shared_config
from gradmem_adapter.utils.directory import replacing_together
from gradmem_adapter.utils.temporary import PREFIX

from .arguments import GradMemTrainingArguments

_OF_THE_RUN = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{PREFIX}*"]
"""Other files in an output directory, which are not pushed."""


class PushingTrainer(Trainer):
    """The part of `GradMemTrainer` that pushes; it is not used by itself.

    Transformers only adds files to a repository, and during training only those of a checkpoint that it knows. Files
    left from an earlier adapter, or digests of other files, would make the checkpoint there unreadable.

    Args:
        config (`GradMemConfig`, *optional*): the config of the trained adapter; None: a module without one.
        kwargs: as for `Trainer`.
    """

    args: GradMemTrainingArguments
    _unfinished: str | None = None
    """The folder of a checkpoint until it is complete."""
    _shared: bool = False
    """Whether checkpoints are for others, even if nothing is pushed during training."""

    def __init__(self, *, config: GradMemConfig | None, **kwargs: Any) -> None:
        self.config = config
        super().__init__(**kwargs)

    def push_to_hub(  # type: ignore[override] # Transformers 5.17 has no `private`
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save, and push the output directory, as `Trainer.push_to_hub` does, replacing an earlier checkpoint.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): the message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): return when everything is uploaded; False: return a
                future.
            token, revision (`str`, *optional*): as for `Trainer.push_to_hub`.
            kwargs: as for `create_model_card`; and `private`, whether a new repository is private.
        """
        if self.config is None:
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        shared_config(cast(PeftModel, self.model))  # raises if others could not use the adapter
        self._shared = True
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        of_new = {"private": kwargs.pop("private")} if "private" in kwargs else {}
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **of_new)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._push_output(commit_message, not blocking, token, revision)

    def _push_output(
        self, message: str | None, as_future: bool, token: str | None = None, revision: str | None = None
    ) -> Any:
        return self._upload(
            cast(str, self.args.output_dir), message, as_future, token, revision,
            ignore_patterns=_OF_THE_RUN, delete_patterns=OWN_PATTERNS,
        )  # fmt: skip

    def _upload(
        self, folder: str, message: str | None, as_future: bool, token: str | None, revision: str | None, **what: Any
    ) -> Any:
        upload: Any = upload_folder  # uses the hub's shared client, which runs uploads one after another
        return upload(
            repo_id=cast(str, self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=as_future,
            **what,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a complete checkpoint while training continues, as set by `hub_strategy`."""
        if self._unfinished is not None:
            return
        if self.config is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        earlier: Any = self.push_in_progress
        waiting = [] if earlier is None else [job for job in earlier.jobs if not job.done()]
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if waiting and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, output = Path(checkpoint_folder), Path(cast(str, self.args.output_dir))
        with replacing_together(output, OWN) as new:
            for there in filter(Path.exists, map(folder.joinpath, OWN)):
                (shutil.copytree if there.is_dir() else shutil.copy)(there, new / there.name)
        shutil.copy(folder / TRAINING_ARGS_NAME, output)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [*waiting, self._push_output(message, as_future=True)]
        if strategy != HubStrategy.EVERY_SAVE:  # also the state to resume training from
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            whole = {"path_in_repo": place, "delete_patterns": "*"}
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", True, None, None, **whole))
        self.push_in_progress = cast(Any, PushInProgress(cast(Any, jobs)))
