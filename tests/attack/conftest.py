"""What the attacks share with other tests."""

import json
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

sys.path.extend(str(Path(__file__).parents[1] / name) for name in (".", "cli", "integrations/langchain"))

from tiny import rows, tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import GradMemConfig, load_backbone, save_checkpoint


@pytest.fixture
def folder(tmp_path):
    """What commands need: a backbone, a checkpoint, two texts and rows."""
    tiny().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    backbone, tokenizer = load_backbone(str(tmp_path / "backbone"))
    save_checkpoint(get_peft_model(backbone, GradMemConfig(num_memory_tokens=2)), tokenizer, tmp_path / "checkpoint")
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(tiny_text(10, seed=i))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(8, 8))))
    return tmp_path
