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
    """Save as `save_checkpoint` does, on the hub, from where `load_checkpoint(repo_id)` opens it.

    A checkpoint that is there is replaced: what this one has no more of it goes, and other files stay.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        repo_id (`str`): the repository, `owner/name`, which is made where there is none.
        card (`Card`, *optional*): what the model card says of data, results and licence. One that is there stays.
        private (`bool`, *optional*): of a new repository; None: as its owner has it.
        token (`str`, *optional*): of the hub; None: the one of `hf auth login`.
        commit_message (`str`, *optional*): what the history says.

    Returns:
        `str`: the address of the commit.

    Raises:
        ValueError: the backbone is a directory of this machine. `model.active_peft_config.base_model_name_or_path` says
            what it is called on the hub.
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
