"""Small files that commands are run on."""

import sys
from pathlib import Path

import pytest
from peft import get_peft_model

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[1])])  # for `commands` and `tiny`

from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, load_backbone, save_checkpoint


@pytest.fixture
def backbone(tmp_path):
    tiny().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


@pytest.fixture
def checkpoint(backbone, tmp_path):
    model, tokenizer = load_backbone(backbone)
    config = GradMemConfig(num_memory_tokens=3, write_steps=2, write_lr=0.3, memory_init_std=0.5, query_format="chat")
    save_checkpoint(get_peft_model(model, config), tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
