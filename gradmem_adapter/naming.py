"""The name of the backbone in a saved adapter, for use on this machine or by others."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import cast

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from gradmem_adapter.backbones import HUB_IDS, is_local
from gradmem_adapter.config import GradMemConfig


def is_hub_id(reference: str | None) -> bool:
    """Whether a reference has the form of a hub id and is not a local directory."""
    try:
        validate_repo_id(reference or "")
    except HFValidationError:
        return False
    return not is_local(cast(str, reference))


def saved_config(model: PeftModel) -> GradMemConfig:
    """The configuration of the active adapter as it is saved.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter; its configuration is not changed.
    """
    config = copy.copy(cast(GradMemConfig, model.active_peft_config))
    opened = cast(PreTrainedModel, model.get_base_model()).name_or_path
    named = config.base_model_name_or_path or opened or None
    if opened in HUB_IDS:  # a name that PEFT and Transformers can open too
        named = HUB_IDS[opened]
    elif named and Path(named).is_dir():  # so that it can be opened from any directory
        named = os.path.abspath(named)
    config.base_model_name_or_path, config.inference_mode = named, True
    return config


def shared_config(model: PeftModel) -> GradMemConfig:
    """The configuration of the active adapter as it is saved for others, who do not have this machine's directories.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter; its configuration is not changed.

    Raises:
        ValueError: its backbone is a local directory.
    """
    config = saved_config(model)
    named = config.base_model_name_or_path
    if named and is_local(named):
        if not config.train_backbone:
            raise ValueError(
                f"The adapter's backbone was opened from {named!r}, which others do not have. Set its hub id with "
                "model.active_peft_config.base_model_name_or_path = 'owner/name', and push again."
            )
        config.base_model_name_or_path = None  # the trained backbone is in the checkpoint
    return config
