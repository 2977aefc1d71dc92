"""The shipped adapter, what it is asked, and what Transformers answers."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for `questions`

from questions import GREEDY, asked

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.utils.shipped import QA


@pytest.fixture(scope="session")
def pipeline():
    return GradMemPipeline(*load_checkpoint(QA))


@pytest.fixture(scope="session")
def questions(pipeline):
    """What `generate` is given, and the tokens that it returns."""
    prompts, states = asked(pipeline)
    ids, mask = pipeline.encode_prompts(prompts)
    given = {"input_ids": ids, "attention_mask": mask, "memory": states, **GREEDY}
    return given, pipeline.model.generate(**given)
