"""Entries of a store that are damaged or exchanged: never read as what they are not, and no text is blocked by one."""

import pytest
import torch
from langchain_gradmem import MemoryStateStore
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStateError

TEXTS = ["w1 w2 w3", "w4 w5 w6", "w7 w8"]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def damage(data, how):
    if how == "empty":
        return b""
    if how == "cut":
        return data[: len(data) // 2]
    if how == "bit":
        return data[:-9] + bytes([data[-9] ^ 64]) + data[-8:]
    return b"something else"


@pytest.mark.parametrize("how", ["empty", "cut", "bit", "foreign"])
def test_a_damaged_entry_blocks_neither_its_text_nor_the_others(pipeline, how):
    store = MemoryStateStore()
    references = store.write(pipeline, TEXTS)
    states = [store.get(reference) for reference in references]
    key = f"default/{references[1]}"
    store.store.mset([(key, damage(store.store.mget([key])[0], how))])
    with pytest.raises(MemoryStateError, match=f"{references[1]}' cannot be read"):
        store.get(references[1])
    with pytest.warns(UserWarning, match=f"{references[1]}.*counts as missing"):
        assert store.write(pipeline, TEXTS) == references
    assert store.writes == 4, "the damaged one alone is written anew"
    again = [store.get(reference) for reference in references]
    assert (again[0], again[2]) == (states[0], states[2])
    torch.testing.assert_close(again[1].vectors, states[1].vectors)  # written in another batch


def test_exchanged_entries_are_not_read(pipeline):
    store = MemoryStateStore()
    first, second, _ = store.write(pipeline, TEXTS)
    keys = [f"default/{first}", f"default/{second}"]
    data = store.store.mget(keys)
    store.store.mset(list(zip(keys, reversed(data), strict=True)))
    for reference in (first, second):
        with pytest.raises(MemoryStateError, match="is another state"):
            store.get(reference)


def test_another_tenants_entry_is_not_read(pipeline):
    store = MemoryStateStore(namespace="alice")
    (reference,) = store.write(pipeline, TEXTS[:1])
    store.store.mset([(f"bob/{reference}", store.store.mget([f"alice/{reference}"])[0])])
    with pytest.raises(MemoryStateError, match="is another state"):
        MemoryStateStore(store.store, namespace="bob").get(reference)


def test_entries_of_before_there_were_names_are_read(pipeline):
    store = MemoryStateStore()
    (reference,) = store.write(pipeline, TEXTS[:1])
    state = store.get(reference)
    store.store.mset([(f"default/{reference}", state.to_bytes())])
    assert store.get(reference) == state
