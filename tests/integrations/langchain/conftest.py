import sys
from pathlib import Path

import pytest
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `tiny`

from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline


def tiny_pipeline(seed=0, **config):
    """A random model whose answers do not end by themselves."""
    backbone = tiny(seed=seed, max_position_embeddings=160)
    backbone.generation_config.eos_token_id = None
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3, write_steps=1, write_lr=0.3, **config)).eval()
    return GradMemPipeline(model, tiny_tokenizer())


@pytest.fixture(scope="session")
def pipeline():
    return tiny_pipeline()
