"""Examples are run as a reader would run them."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, save_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny model with room for the examples' texts."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = tiny(max_position_embeddings=512)
    config = GradMemConfig(num_memory_tokens=3, write_steps=1, write_lr=0.3, train_backbone=True)
    save_checkpoint(get_peft_model(backbone, config), tiny_tokenizer(), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def run():
    """Runs an example with arguments, and returns what it prints."""

    def run(name, *arguments):
        command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
