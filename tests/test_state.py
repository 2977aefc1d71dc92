"""MemoryState: shapes, selection, joining, and the file format with everything that can be wrong with a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmem_adapter.state import MemoryState, MemoryStateError
from gradmem_adapter.utils import state_file

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def make(
    batch: int = 3, m: int = 2, d: int = 4, steps: int = 2, seed: int = 0, dtype: Any = torch.float32, mark: str = "f"
) -> MemoryState:
    random = torch.Generator().manual_seed(seed)
    return MemoryState(
        vectors=torch.randn(batch, m, d, generator=random).to(dtype),
        context_tokens=torch.randint(1, 100, (batch,), generator=random),
        write_losses=torch.rand(batch, steps + 1, generator=random),
        fingerprint=mark,
    )


@st.composite
def states(draw: st.DrawFn, **fixed: Any) -> MemoryState:
    """States of any small shape, dtype and fingerprint, some with a negative zero."""
    options: dict[str, Any] = {
        "batch": draw(st.integers(1, 4)),
        "m": draw(st.integers(1, 4)),
        "d": draw(st.integers(1, 5)),
        "steps": draw(st.integers(0, 4)),
        "seed": draw(st.integers(0, 1000)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "mark": draw(st.text(max_size=150)),
    }
    state = make(**(options | fixed))
    state.vectors.view(-1)[0] = draw(st.sampled_from([0.5, -0.0]))
    return state


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(one: MemoryState, other: MemoryState) -> None:
    """Compares bit for bit, without using `equal`."""
    for name in ("vectors", "context_tokens", "write_losses"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert bits(a) == bits(b), name
    assert one.fingerprint == other.fingerprint


# ------------------------------------------------------------------ construction


def test_properties_describe_the_vectors():
    state = make(batch=3, m=2, d=4, dtype=torch.bfloat16)
    assert (len(state), state.num_memory_tokens, state.width) == (3, 2, 4)
    assert state.nbytes == 3 * 2 * 4 * 2
    assert state.dtype == torch.bfloat16
    assert state.device == torch.device("cpu")


def test_fields_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        make().fingerprint = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vectors": [[[1.0]]]}, TypeError, "vectors must be a tensor, got list"),
        ({"context_tokens": 3}, TypeError, "context_tokens must be a tensor, got int"),
        ({"write_losses": None}, TypeError, "write_losses must be a tensor, got NoneType"),
        ({"vectors": torch.zeros(3, 2, 4, dtype=torch.long)}, TypeError, "floating point, got torch.int64"),
        ({"vectors": torch.zeros(2, 4)}, ValueError, r"vectors must have shape .* got \(2, 4\)"),
        ({"vectors": torch.zeros(0, 2, 4)}, ValueError, r"none of them 0, got \(0, 2, 4\)"),
        ({"vectors": torch.zeros(3, 0, 4)}, ValueError, r"none of them 0, got \(3, 0, 4\)"),
        ({"context_tokens": torch.ones(2, dtype=torch.long)}, ValueError, r"must hold 3 integers.*got shape \(2,\)"),
        ({"context_tokens": torch.ones(3, 1, dtype=torch.long)}, ValueError, r"must hold 3 integers"),
        ({"context_tokens": torch.ones(3)}, ValueError, "must hold 3 integers.*torch.float32"),
        ({"write_losses": torch.zeros(3)}, ValueError, r"write_losses must have shape \[3, steps \+ 1\], got \(3,\)"),
        ({"write_losses": torch.zeros(2, 3)}, ValueError, r"write_losses must have shape \[3"),
        ({"write_losses": torch.zeros(3, 0)}, ValueError, r"write_losses must have shape \[3"),
        ({"fingerprint": b"f"}, TypeError, "fingerprint must be a string, got bytes"),
    ],
)
def test_bad_contents_are_refused(changes: dict[str, Any], error: type[Exception], message: str):
    good = make()
    fields = {name: getattr(good, name) for name in ("vectors", "context_tokens", "write_losses", "fingerprint")}
    with pytest.raises(error, match=message):
        MemoryState(**(fields | changes))


def test_repr_is_short_and_names_shape_dtype_and_device():
    text = repr(make(batch=3, m=2, d=4, dtype=torch.bfloat16, mark="abcdefgh" + "z" * 500))
    assert len(text) < 150
    for part in ("3 x 2 vectors of 4", "bfloat16", "cpu", "abcdefgh"):
        assert part in text
    assert "zz" not in text


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (0, [0]),
        (-1, [3]),
        (-4, [0]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([2, 0, 2, -1], [2, 0, 2, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
def test_an_index_selects_states(index: Any, rows: list[int]):
    state = make(batch=4)
    picked = state[index]
    assert len(picked) == len(rows)
    for name in ("vectors", "context_tokens", "write_losses"):
        expected = torch.stack([getattr(state, name)[row] for row in rows])
        assert torch.equal(getattr(picked, name), expected), name
    assert picked.fingerprint == state.fingerprint


@pytest.mark.parametrize("index", [3, -4, [0, 3], torch.tensor([3])])
def test_an_index_out_of_range_is_refused(index: Any):
    with pytest.raises(IndexError, match=r"[Ii]ndex -?[34]"):
        make(batch=3)[index]


@pytest.mark.parametrize("index", [slice(2, 2), slice(9, None), [], torch.tensor([False] * 3)])
def test_an_empty_selection_is_refused(index: Any):
    with pytest.raises(IndexError, match="at least one state"):
        make(batch=3)[index]


def test_iteration_ends_and_gives_batches_of_one():
    parts = list(make(batch=3))
    assert [len(part) for part in parts] == [1, 1, 1]


@settings(max_examples=50, deadline=None)
@given(states())
def test_stack_undoes_iteration(state: MemoryState):
    assert_same(MemoryState.stack(list(state)), state)


# ------------------------------------------------------------------ joining


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4))
def test_index_undoes_stack(shapes: list[tuple[int, int]]):
    parts = [make(batch=batch, steps=steps, seed=i) for i, (batch, steps) in enumerate(shapes)]
    stacked = MemoryState.stack(parts)
    longest = max(steps for _, steps in shapes)
    assert stacked.write_losses.shape == (sum(batch for batch, _ in shapes), longest + 1)
    start = 0
    for part, (_, steps) in zip(parts, shapes, strict=True):
        back = stacked[start : start + len(part)]
        start += len(part)
        assert torch.equal(back.vectors, part.vectors)
        assert torch.equal(back.context_tokens, part.context_tokens)
        assert torch.equal(back.write_losses[:, : steps + 1], part.write_losses)
        padding = back.write_losses[:, steps + 1 :]
        assert torch.equal(padding, part.write_losses[:, -1:].expand_as(padding))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4), st.integers(1, 3))
def test_concat_puts_states_side_by_side(shapes: list[tuple[int, int]], batch: int):
    parts = [make(batch=batch, m=m, steps=steps, seed=i) for i, (m, steps) in enumerate(shapes)]
    joined = MemoryState.concat(parts)
    assert joined.vectors.shape == (batch, sum(m for m, _ in shapes), 4)
    assert joined.write_losses.shape == (batch, max(steps for _, steps in shapes) + 1)
    start = 0
    for part in parts:
        assert torch.equal(joined.vectors[:, start : start + part.num_memory_tokens], part.vectors)
        start += part.num_memory_tokens
    assert joined.context_tokens.tolist() == [sum(int(p.context_tokens[i]) for p in parts) for i in range(batch)]


def test_concat_weights_losses_by_tokens_after_padding():
    one = MemoryState(torch.zeros(1, 1, 2), torch.tensor([30]), torch.tensor([[4.0, 2.0, 1.0]]), "f")
    two = MemoryState(torch.ones(1, 2, 2), torch.tensor([10]), torch.tensor([[8.0, 6.0]]), "f")
    joined = MemoryState.concat([one, two])
    assert joined.write_losses.tolist() == [[5.0, 3.0, 2.25]]
    assert joined.write_losses.dtype == torch.float32
    assert joined.context_tokens.tolist() == [40]


@pytest.mark.parametrize("join", [MemoryState.stack, MemoryState.concat])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"d": 5}, r"same width, got \[4, 5\]"),
        ({"dtype": torch.float16}, "same dtype"),
        ({"mark": "another"}, r"same fingerprint, got \['f', 'another'\]"),
    ],
)
def test_joining_unlike_states_is_refused(join: Any, other: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        join([make(), make(**other)])


def test_joining_shapes_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"same num_memory_tokens, got \[2, 3\]"):
        MemoryState.stack([make(m=2), make(m=3)])
    with pytest.raises(ValueError, match=r"same batch size, got \[3, 1\]"):
        MemoryState.concat([make(batch=3), make(batch=1)])
    for join in (MemoryState.stack, MemoryState.concat):
        with pytest.raises(ValueError, match="no memory states"):
            join([])


# ------------------------------------------------------------------ place and dtype


def test_to_casts_only_the_vectors():
    state = make()
    for half in (state.to(torch.bfloat16), state.to(dtype=torch.bfloat16), state.to("cpu", torch.bfloat16)):
        assert half.dtype == torch.bfloat16
        assert half.nbytes * 2 == state.nbytes
        assert torch.equal(half.vectors, state.vectors.to(torch.bfloat16))
        assert half.write_losses.dtype == torch.float32
        assert half.context_tokens.dtype == torch.int64
    assert state.to("meta").vectors.is_meta
    assert state.to("meta").context_tokens.is_meta
    with pytest.raises(TypeError, match=r"floating point, got torch\.int32"):
        state.to(torch.int32)


def test_detach_and_cpu():
    state = make()
    state.vectors.requires_grad_()
    assert (state.vectors * 2).requires_grad
    detached = state.detach()
    assert not detached.vectors.requires_grad
    assert_same(detached.cpu(), state)


def test_equal_compares_every_field():
    state = make()
    assert state.equal(make())
    assert not state.equal(make(seed=1))
    assert not state.equal(make(mark="another"))
    assert not state.equal(make(dtype=torch.float64))
    changed = make()
    changed.write_losses[0, 0] += 1
    assert not state.equal(changed)


def test_states_can_be_used_in_inference_mode(tmp_path: Path):
    with torch.inference_mode():
        state = make()
        state.save(tmp_path / "s.safetensors")
        loaded = MemoryState.load(tmp_path / "s.safetensors")
        assert_same(MemoryState.stack(list(loaded)), state)
        assert MemoryState.concat([state, loaded]).num_memory_tokens == 4
        state.to(torch.bfloat16).detach().cpu()
    assert state.to_bytes() == loaded.to_bytes()
    assert not state[0].vectors.requires_grad


# ------------------------------------------------------------------ bytes


@settings(max_examples=150, deadline=None)
@given(states())
def test_states_survive_a_round_trip_through_bytes(state: MemoryState):
    data = state.to_bytes()
    loaded = MemoryState.from_bytes(data)
    assert_same(loaded, state)
    assert loaded.to_bytes() == data


@pytest.mark.parametrize("length", range(0, 600, 7))
def test_every_length_of_the_header_can_be_read(length: int):
    """The file starts with the low byte of the header's length, which for some is 0x80, as in a pickle."""
    state = make(mark="x" * length)
    assert_same(MemoryState.from_bytes(state.to_bytes()), state)


def test_the_lengths_above_cover_the_byte_a_pickle_starts_with():
    assert any(make(mark="x" * length).to_bytes()[:1] == b"\x80" for length in range(0, 600, 7))


def test_bytes_depend_only_on_contents():
    state = make(batch=2, m=3, d=4)
    strided = MemoryState(
        state.vectors.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        torch.stack([state.context_tokens, state.context_tokens], 1)[:, 0],
        state.write_losses.T.contiguous().T,
        state.fingerprint,
    )
    assert not strided.vectors.is_contiguous()
    assert not strided.context_tokens.is_contiguous()
    assert strided.to_bytes() == state.to_bytes()
    whole = torch.zeros(5, 3, 4)
    whole[1:3] = state.vectors
    view = MemoryState(whole[1:3], state.context_tokens, state.write_losses, state.fingerprint)
    assert view.to_bytes() == state.to_bytes()


def test_strides_of_a_single_value_do_not_matter():
    """Torch calls a tensor of one value contiguous whatever its stride, as a row of a batch is."""
    state = make(batch=1)
    odd = MemoryState(state.vectors, state.context_tokens.as_strided((1,), (5,)), state.write_losses, state.fingerprint)
    assert odd.to_bytes() == state.to_bytes()


def test_metadata_is_one_json_key_with_sorted_keys():
    data = make(mark="the model").to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["gradmem"]
    text = header["__metadata__"]["gradmem"]
    description = json.loads(text)
    assert len(description.pop("digest")) == 64
    assert description == {"format": "gradmem-memory-state", "version": 2, "fingerprint": "the model"}
    assert text == json.dumps(json.loads(text), sort_keys=True)


_IN_A_NEW_PROCESS = """
import hashlib
import torch
from gradmem_adapter import MemoryState
state = MemoryState(
    torch.arange(24.0).view(2, 3, 4), torch.tensor([5, 7]), torch.arange(6.0).view(2, 3), "model 1"
)
print(hashlib.sha256(state.to_bytes()).hexdigest())
"""


def test_two_processes_give_the_same_bytes():
    here = MemoryState(
        torch.arange(24.0).view(2, 3, 4), torch.tensor([5, 7]), torch.arange(6.0).view(2, 3), "model 1"
    ).to_bytes()
    for hash_seed in ("1", "2"):
        output = subprocess.run(
            [sys.executable, "-c", _IN_A_NEW_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert output.strip() == hashlib.sha256(here).hexdigest()


# ------------------------------------------------------------------ files


def test_states_survive_a_round_trip_through_files(tmp_path: Path):
    state = make(dtype=torch.bfloat16)
    for path in (tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")):
        state.save(path)
        assert_same(MemoryState.load(path), state)
        assert Path(path).read_bytes() == state.to_bytes()
    assert MemoryState.load(tmp_path / "a.safetensors", device="meta").vectors.is_meta
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_save_replaces_an_earlier_file(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    make(seed=1).save(path)
    make(seed=2, batch=1).save(path)
    assert_same(MemoryState.load(path), make(seed=2, batch=1))
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_save_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make().save("s.safetensors")
    assert_same(MemoryState.load("s.safetensors"), make())


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: BaseException
):
    path = tmp_path / "s.safetensors"
    make(seed=1).save(path)

    def fail(*_: Any) -> None:
        assert len(os.listdir(tmp_path)) == 2, "the new file must be written beside the old one"
        raise failure

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(failure)):
        make(seed=2).save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert_same(MemoryState.load(path), make(seed=1))


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    make().save(tmp_path / "s.safetensors")
    assert calls == ["fsync", "replace"]


def test_save_makes_no_directories(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*missing.*create it first"):
        make().save(tmp_path / "missing" / "s.safetensors")
    assert os.listdir(tmp_path) == []


def test_loading_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        MemoryState.load(tmp_path / "none.safetensors")


def _tensors(**changes: Any) -> dict[str, torch.Tensor]:
    good = make()
    tensors = {
        "vectors": good.vectors,
        "context_tokens": good.context_tokens,
        "write_losses": good.write_losses,
    } | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _file(description: Any, **changes: Any) -> bytes:
    """A safetensors file with this description (a string as it is, None for none at all)."""
    text = description if isinstance(description, str) else json.dumps(description)
    return safetensors.torch.save(_tensors(**changes), metadata=None if description is None else {"gradmem": text})


def _torch_save(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(_tensors(), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


_GOOD = {"format": "gradmem-memory-state", "version": 2, "fingerprint": "f", "digest": "0" * 64}


def _digested(**changes: Any) -> bytes:
    """A file with the right digest."""
    return _file(_GOOD | {"digest": state_file._digest(_tensors(**changes), "f", None)}, **changes)


_BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a memory state"),
    "a few bytes": (b"abc", "not a memory state"),
    "text": (b"Once upon a time there was a model.", "not a safetensors file"),
    "zeros": (bytes(64), "not a safetensors file"),
    "torch.save": (_torch_save(legacy=False), "looks like a pickle.*never opened"),
    "old torch.save": (_torch_save(legacy=True), "looks like a pickle.*never opened"),
    "pickle": (pickle.dumps({"vectors": [1.0]}), "looks like a pickle.*never opened"),
    "header cut": (make().to_bytes()[:40], "truncated"),
    "tensors cut": (make().to_bytes()[:-1], "truncated"),
    "bytes added": (make().to_bytes() + b"\0", "truncated or damaged"),
    "no metadata": (_file(None), "not a memory state"),
    "other metadata": (safetensors.torch.save(_tensors(), metadata={"format": "pt"}), "not a memory state"),
    "other format": (_file(_GOOD | {"format": "another"}), "its format is 'another'"),
    "not JSON": (_file("{format:"), "not a memory state"),
    "JSON but no object": (_file([1]), "not a memory state"),
    "no version": (_file({"format": "gradmem-memory-state", "fingerprint": "f"}), "not a memory state"),
    "newer": (_file(_GOOD | {"version": 4}), "version 4, .*Upgrade gradmem-adapter"),
    "deep description": (_file("[" * 100_000), "not a memory state"),
    "infinite version": (_file('{"format": "gradmem-memory-state", "version": 1e400, "fingerprint": "f"}'), "version"),
    "version true": (_file(_GOOD | {"version": True}), "version or fingerprint"),
    "version 1": (_file(_GOOD | {"version": 1}), "version or fingerprint"),
    "fingerprint is a number": (_file(_GOOD | {"fingerprint": 3}), "version or fingerprint"),
    "without a digest": (_file({name: value for name, value in _GOOD.items() if name != "digest"}), "damaged: it has"),
    "wrong digest": (_file(_GOOD), "damaged.*digest"),
    "endless context": (_digested(context_tokens=torch.tensor([1, 2, 2**62])), "to 4611686018427387904 tokens"),
    "empty context": (_digested(context_tokens=torch.tensor([1, 2, 0])), "0 to 2 tokens"),
    "boolean tokens": (_file(_GOOD, context_tokens=torch.ones(3, dtype=torch.bool)), "context_tokens must be integers"),
    "integer losses": (_file(_GOOD, write_losses=torch.ones(3, 3, dtype=torch.long)), "write_losses must be floating"),
    "eight-bit vectors": (_file(_GOOD, vectors=torch.zeros(3, 2, 4).to(torch.float8_e4m3fn)), "must be floating point"),
    "not finite": (_digested(vectors=torch.full((3, 2, 4), float("nan"))), "not finite"),
    "one tensor more": (_file(_GOOD, another=torch.ones(2)), "wrong tensors: .*another"),
    "long header": ((2**21).to_bytes(8, "little") + b"{" + bytes(2**21), "more than 1,048,576 bytes"),
    "no vectors": (_file(_GOOD, vectors=None), "wrong tensors: expected .*vectors"),
    "no losses": (_file(_GOOD, write_losses=None), "wrong tensors: expected .*write_losses"),
    "flat vectors": (_digested(vectors=torch.zeros(3, 4)), r"vectors must have shape"),
    "integer vectors": (_file(_GOOD, vectors=torch.zeros(3, 2, 4, dtype=torch.int8)), "must be floating point"),
    "other batch": (_digested(context_tokens=torch.ones(9, dtype=torch.long)), "must hold 3 integers"),
}


@pytest.mark.parametrize("case", _BAD_FILES)
def test_a_bad_file_is_named_and_explained(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, message = _BAD_FILES[case]
    path = tmp_path / "suspect.safetensors"
    path.write_bytes(data)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(MemoryStateError, match=f"(?s)suspect.safetensors.*{message}"):
        MemoryState.load(path)
    with pytest.raises(MemoryStateError, match=f"(?s){message}"):
        MemoryState.from_bytes(data)


def test_the_good_description_is_good():
    """Otherwise the cases above could fail for a reason other than their own."""
    assert_same(MemoryState.from_bytes(_digested()), make())


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_type_are_read(kind: type):
    assert_same(MemoryState.from_bytes(kind(make().to_bytes())), make())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_states_are_not_saved(tmp_path: Path, value: float):
    state = make()
    state.vectors[1, 0, 2] = value
    with pytest.raises(ValueError, match="not finite, because WRITE diverged"):
        state.save(tmp_path / "s.safetensors")
    assert os.listdir(tmp_path) == []
    assert state == state.cpu(), "it can still be compared"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_prefix_of_a_file_is_read(data: st.DataObject):
    whole = make(batch=1).to_bytes()
    with pytest.raises(MemoryStateError):
        MemoryState.from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_memory_state_error(data: bytes):
    for candidate in (data, len(data).to_bytes(8, "little") + b"{" + data):
        with pytest.raises(MemoryStateError):
            MemoryState.from_bytes(candidate)
