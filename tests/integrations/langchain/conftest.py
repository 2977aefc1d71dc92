import sys
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_gradmem import ChatGradMem, TurnMemory

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[2])])  # for `tiny_pipeline` and `tiny`

from tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="session")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def memory(pipeline):
    return TurnMemory(pipeline=pipeline, max_turns=3, keep_turns=2)


@pytest.fixture
def chat(pipeline, memory):
    return ChatGradMem(pipeline=pipeline, store=memory.store, max_tokens=3)


@pytest.fixture
def turn():
    """The i-th turn of a conversation."""
    return lambda i: [HumanMessage(f"w{i} w{i + 1}"), AIMessage(f"w{i + 2}")]
