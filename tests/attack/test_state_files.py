"""State files changed in many ways are read as they were saved, or refused with our own error."""

import json
import os
import random
import warnings

import pytest
import torch

from gradmem_adapter import MemoryState, MemoryStateError
from gradmem_adapter.utils import state_file


def state(seed, dtype=torch.float32):
    values = torch.Generator().manual_seed(seed)
    return MemoryState(
        torch.randn(2, 3, 8, generator=values).to(dtype),
        torch.randint(1, 99, (2,), generator=values),
        torch.rand(2, 3, generator=values),
        f"model {seed}",
    )


def flip_a_bit(data, dice, _):
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def change_bytes(data, dice, _):
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(len(data))] = dice.randrange(256)


def cut(data, dice, _):
    del data[dice.randrange(len(data)) :]


def insert(data, dice, _):
    place = dice.randrange(len(data))
    data[place:place] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 9)))


def take_out(data, dice, _):
    place = dice.randrange(len(data))
    del data[place : place + dice.randint(1, 9)]


def zero_a_page(data, dice, _):
    place = dice.randrange(len(data))
    data[place : place + 64] = bytes(len(data[place : place + 64]))


def splice(data, dice, other):
    place = dice.randrange(min(len(data), len(other)))
    data[place:] = other[place:]


def swap(data, dice, _):
    a, b = sorted(dice.randrange(len(data)) for _ in range(2))
    data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]


def change_a_digit(data, dice, _):
    digits = [i for i, byte in enumerate(data[8:700], 8) if chr(byte).isdigit()]
    data[dice.choice(digits)] = ord(dice.choice("0123456789"))


MUTATIONS = (flip_a_bit, change_bytes, cut, insert, take_out, zero_a_page, splice, swap, change_a_digit)


def attack(count):
    """Mutates files; returns how many of them were still read as before."""
    dice, same = random.Random(0), 0
    good = [state(i, dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64))]
    files = [one.to_bytes() for one in good]
    for i in range(count):
        which = i % len(good)
        data = bytearray(files[which])
        MUTATIONS[i // len(good) % len(MUTATIONS)](data, dice, files[which - 1])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what is not protected by a digest counts as read
                loaded = MemoryState.from_bytes(bytes(data))
        except MemoryStateError:
            continue
        assert data in files or loaded == good[which], (
            f"mutation {i} was read as another state"
        )  # a splice may be whole
        same += 1
    return same


def test_mutated_files_are_refused_or_unchanged():
    assert attack(1_000) < 500, "most mutations must change what the file holds"


@pytest.mark.slow
def test_many_mutated_files_are_refused_or_unchanged():
    attack(10_000)


def test_every_bit_of_the_vectors_counts():
    data = state(0).to_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for place in range(begin, len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(MemoryStateError, match="damaged"):
                MemoryState.from_bytes(changed)


HEADERS = {
    "deep": b'{"a":' + b"[" * 100_000,
    "infinite": b'{"vectors":{"dtype":"F32","shape":[1],"data_offsets":[0,1e400]}}',
    "long": b'{"vectors":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 6000 + b"]}}",
    "deep description": json.dumps({"__metadata__": {"gradmem": "[" * 100_000}}).encode(),
    "no description": b'{"__metadata__":"x"}',
    "no text": b"{\xff\xfe}",
}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("header", HEADERS)
def test_invalid_headers_are_refused_with_one_kind_of_error(header, kind):
    data = len(HEADERS[header]).to_bytes(8, "little") + HEADERS[header] + bytes(8)
    with pytest.raises(MemoryStateError):
        MemoryState.from_bytes(kind(data))


@pytest.mark.parametrize("tokens", [2**62, 2**40 + 1, 0, -1])
def test_absurd_token_counts_are_refused(tokens, monkeypatch):
    absurd = MemoryState(torch.ones(1, 1, 1), torch.tensor([tokens]), torch.zeros(1, 1), "model")
    with pytest.raises(ValueError, match="range is 1 to 1099511627776"):
        absurd.to_bytes()
    with monkeypatch.context() as lax:
        lax.setattr(state_file, "_wrong_counts", lambda tokens: None)
        forged = absurd.to_bytes()
    with pytest.raises(MemoryStateError, match="range is 1 to 1099511627776"):
        MemoryState.from_bytes(forged)


def test_large_token_counts_survive_saving():
    """A document written sequentially can have any number of tokens."""
    long = MemoryState(torch.ones(2, 1, 1), torch.tensor([2**24 + 1, 2**40]), torch.zeros(2, 1), "model")
    assert MemoryState.from_bytes(long.to_bytes()) == long


@pytest.mark.parametrize("data", [2**40, None, "text", [1]])
def test_anything_but_bytes_is_refused(data):
    with pytest.raises(TypeError, match="Expected the bytes of a memory state"):
        MemoryState.from_bytes(data)


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero"):
        with pytest.raises(OSError, match="expected a regular file"):
            MemoryState.load(path)


@pytest.mark.parametrize("begin", ["zeros", "state", "state of that size"])
def test_sparse_files_of_a_terabyte_are_refused(tmp_path, begin):
    data, size = b"" if begin == "zeros" else state(0).to_bytes(), 2**40
    if begin == "state of that size":
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header["vectors"] = {"dtype": "F32", "shape": [1, 1, 2**38], "data_offsets": [0, 2**40]}
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text
        size += len(data)
    (tmp_path / "sparse").write_bytes(data)
    os.truncate(tmp_path / "sparse", size)
    with pytest.raises(MemoryStateError, match=r"not a safetensors file|truncated or damaged|bytes of memory are free"):
        MemoryState.load(tmp_path / "sparse")
