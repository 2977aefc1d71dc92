"""A checkpoint on the hub, with everything it needs to answer."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from gradmem_adapter.card import Card
from gradmem_adapter.checkpoint import OWN_PATTERNS, save_beside
from gradmem_adapter.naming import shared_config
from gradmem_adapter.utils.directory import CARD


def push_to_hub(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    card: Card | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a GradMem adapter",
) -> str:
    """Save on the hub as `save_checkpoint` does, for `load_checkpoint(repo_id)`.

    An existing checkpoint is replaced: those of its files that the new one lacks are deleted, and other files stay.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        repo_id (`str`): the repository, `owner/name`, created if it does not exist.
        card (`Card`, *optional*): what the model card says about data, results and licence. An existing card stays.
        private (`bool`, *optional*): whether a new repository is private; None: its owner's default.
        token (`str`, *optional*): hub token; None: the one of `hf auth login`.
        commit_message (`str`, *optional*): the message of the commit.

    Returns:
        `str`: the address of the commit.

    Raises:
        ValueError: the backbone is a local directory. Set `model.active_peft_config.base_model_name_or_path` to its
            name on the hub.
    """
    config = shared_config(model)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        save_beside(model, tokenizer, directory, card=replace(card or Card(), name=repo_id), config=config)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            ignore_patterns=[CARD] if CARD in api.list_repo_files(repo_id) else None,
            delete_patterns=OWN_PATTERNS,
        )
        return str(commit)
