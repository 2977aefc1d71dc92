"""AtomicFileStore: LangChain's own tests of stores, and what it promises beyond them."""

import os

import pytest
from langchain_gradmem import AtomicFileStore
from langchain_tests.integration_tests import BaseStoreAsyncTests, BaseStoreSyncTests

VALUES = b"one", b"", bytes(range(256))


class TestSync(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, tmp_path):
        return AtomicFileStore(tmp_path / "made" / "later")

    @pytest.fixture
    def three_values(self):
        return VALUES


class TestAsync(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    async def kv_store(self, tmp_path):
        return AtomicFileStore(tmp_path)

    @pytest.fixture
    def three_values(self):
        return VALUES


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "/x", "x/", "x//y", "x/../y", ".hidden", "x/.y", "x\0", "x y", "x\n", "ä", 3, None]
)
def test_keys_are_names(tmp_path, key):
    store = AtomicFileStore(tmp_path / "store")
    store.mset([("x", b"x")])
    (tmp_path / "x").write_bytes(b"outside")
    for attempt in (
        lambda: store.mget([key]),
        lambda: store.mset([("y", b"y"), (key, b"z")]),
        lambda: store.mdelete(["x", key]),
    ):
        with pytest.raises(ValueError, match="A key is made of"):
            attempt()
    assert list(store.yield_keys()) == ["x"]
    assert os.listdir(tmp_path / "store") == ["x"]


def test_keys_by_their_beginning(tmp_path):
    store = AtomicFileStore(tmp_path / "store")
    keys = ["alice/1", "alice/2", "alicia/1", "bob/x/y.z", "top"]
    store.mset([(key, b"") for key in reversed(keys)])
    (tmp_path / "store" / "alice" / ".half").touch()
    (tmp_path / "outside").touch()
    assert sorted(store.yield_keys()) == keys
    assert list(store.yield_keys(prefix="alic")) == keys[:3]
    assert list(store.yield_keys(prefix="alice/")) == keys[:2]
    assert list(store.yield_keys(prefix="bob/x/y")) == ["bob/x/y.z"]
    assert list(store.yield_keys(prefix="../")) == list(store.yield_keys(prefix="/")) == []
    assert store.mget(["alice", "alice/1/2"]) == [None, None], "what is no file is no key"
