"""LangChain's own standard tests."""

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_gradmem import ChatGradMem, GradMemCompressor, GradMemRetriever, MemoryStateStore
from langchain_tests.integration_tests import (
    BaseStoreAsyncTests,
    BaseStoreSyncTests,
    ChatModelIntegrationTests,
    RetrieversIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests
from tiny_pipeline import byte_pipeline, tiny_pipeline

PIPELINE = tiny_pipeline()


CHAT = byte_pipeline()  # which can spell JSON


class _Chat:
    @property
    def chat_model_class(self):
        return ChatGradMem

    @property
    def chat_model_params(self):
        return {"pipeline": CHAT}

    @property
    def has_tool_calling(self):
        return False  # bind_tools exists only to say so


class TestChatUnit(_Chat, ChatModelUnitTests):
    pass


class TestChat(_Chat, ChatModelIntegrationTests):
    @property
    def has_structured_output(self):
        return False  # its strings have no maximum length, and a random model does not end them: test_structured.py


class _Fixed(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(f"w{i} w{i + 1} {query}", metadata={"number": i}) for i in range(5)]


class TestRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return GradMemRetriever

    @property
    def retriever_constructor_params(self):
        return {"base_retriever": _Fixed(), "base_compressor": GradMemCompressor(pipeline=PIPELINE)}

    @property
    def retriever_query_example(self):
        return "w7"


@pytest.fixture(scope="module")
def states():
    return tuple(PIPELINE.write(["w1 w2 w3", "w4 w5", "w6"]))


class _ByName(MemoryStateStore):
    """The tests' keys are words, but the store takes only references: words are encoded as references."""

    def mget(self, keys):
        return super().mget([_spelled(key) for key in keys])

    def mset(self, key_value_pairs):
        super().mset([(_spelled(key), state) for key, state in key_value_pairs])

    def mdelete(self, keys):
        super().mdelete([_spelled(key) for key in keys])

    def yield_keys(self, *, prefix=None):
        for reference in super().yield_keys(prefix=(prefix or "").encode().hex()):
            yield bytes.fromhex(reference).rstrip(b"\0").decode()


def _spelled(word):
    return word.encode().hex().ljust(32, "0")


class TestStore(BaseStoreSyncTests):
    @pytest.fixture
    def kv_store(self):
        return _ByName()

    @pytest.fixture
    def three_values(self, states):
        return states


class TestStoreAsync(BaseStoreAsyncTests):
    @pytest.fixture
    async def kv_store(self):
        return _ByName()

    @pytest.fixture
    def three_values(self, states):
        return states
