"""Damaged or exchanged entries of a store are never read as something else, and block no text."""

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


def file_of(store, reference):
    return store.store.path / "states" / reference[:2] / f"{reference}.safetensors"


@pytest.mark.parametrize("how", ["empty", "cut", "bit", "foreign"])
def test_a_damaged_entry_blocks_neither_its_text_nor_the_others(pipeline, how):
    store = MemoryStateStore()
    references = store.write(pipeline, TEXTS)
    states = [store.get(reference) for reference in references]
    file = file_of(store, references[1])
    file.write_bytes(damage(file.read_bytes(), how))
    with pytest.raises(MemoryStateError, match=f"{references[1]}' cannot be read"):
        store.get(references[1])
    with pytest.warns(UserWarning, match=f"{references[1]}.*is written again"):
        assert store.write(pipeline, TEXTS) == references
    assert store.writes == 4, "the damaged one alone is written anew"
    again = [store.get(reference) for reference in references]
    assert (again[0], again[2]) == (states[0], states[2])
    torch.testing.assert_close(again[1].vectors, states[1].vectors, rtol=2**-7, atol=1e-5)  # written in another batch


def test_exchanged_entries_are_not_read(pipeline):
    store = MemoryStateStore()
    files = [file_of(store, reference) for reference in store.write(pipeline, TEXTS[:2])]
    data = [file.read_bytes() for file in files]
    for file, other in zip(files, reversed(data), strict=True):
        file.write_bytes(other)
    for file in files:
        with pytest.raises(MemoryStateError, match="belongs to another state"):
            store.get(file.stem)


def test_a_plain_state_file_is_not_an_entry(pipeline):
    store = MemoryStateStore()
    (reference,) = store.write(pipeline, TEXTS[:1])
    store.get(reference).save(file_of(store, reference))
    with pytest.raises(MemoryStateError, match="not one that a memory store wrote"):
        store.get(reference)
