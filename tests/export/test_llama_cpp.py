"""What llama.cpp is given, recorded by a fake module; tests/engines uses the real one."""

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from adapters import make
from engine_threads import at_once
from tiny import tokens

from gradmem_adapter.export.llama_cpp import LlamaCppReader

GREEDY = {"max_new_tokens": 6, "do_sample": False}


class Llama:
    """`llama_cpp.Llama` as far as it is used: answers 10, 11 and the end token."""

    ctx, n_batch, n_tokens = "context", 16, 0

    def __init__(self):
        self.sequences, self.sampling = [], []

    def n_ctx(self):
        return 32

    def n_embd(self):
        return 32

    def eval(self, ids):
        self.sequences[-1][1].append((self.n_tokens, list(ids)))
        self.n_tokens += len(ids)

    def sample(self, **options):
        self.sampling.append(options)
        return (10, 11, 2)[len(self.sequences[-1][1]) - 1]


@pytest.fixture
def llama(monkeypatch):
    llama, module = Llama(), ModuleType("llama_cpp")
    module.calls, module.status = [], 0

    def init(length, width, sequences):
        return SimpleNamespace(
            embd=(ctypes.c_float * (length * width))(),
            pos=[None] * length,
            n_seq_id=[None] * length,
            seq_id=[[None] * sequences for _ in range(length)],
            logits=[None] * length,
        )

    def decode(context, batch):
        module.calls.append("decode")
        llama.sequences.append((batch, []))
        return module.status

    module.llama_batch_init, module.llama_decode = init, decode
    module.llama_kv_cache_clear = lambda context: module.calls.append("clear")
    module.llama_batch_free = lambda batch: module.calls.append("free")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    llama.module = module
    return llama


@pytest.fixture(scope="module")
def model():
    return make(num_control_tokens=1)


def test_memory_is_read_as_vectors_and_the_prompt_as_tokens(model, llama):
    states, ids = model.write(tokens(2, 9)), tokens(2, 4, seed=1)
    output = LlamaCppReader(model, llama, check_model=False).generate(ids, memory=states, **GREEDY)
    assert output.tolist() == [[*row, 10, 11, 2] for row in ids.tolist()]
    length = model.prefix_length
    for memory, row, (batch, evaluated) in zip(
        model.prefix_embeddings(states), ids.tolist(), llama.sequences, strict=True
    ):
        assert torch.tensor(list(batch.embd)).view_as(memory).equal(memory)
        assert (batch.pos, batch.n_tokens) == (list(range(length)), length)
        assert (batch.n_seq_id, batch.seq_id) == ([1] * length, [[0]] * length)
        assert evaluated == [(length, row), (length + 4, [10]), (length + 5, [11])]
    assert llama.module.calls == ["clear", "decode", "free"] * 2
    assert llama.sampling[0] == {"temp": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_prompts_that_do_not_fit_are_refused(model, llama, monkeypatch):
    states, reader = model.write(tokens(2, 9)), LlamaCppReader(model, llama, check_model=False)
    with pytest.raises(ValueError, match="n_ctx=32"):
        reader.generate(tokens(1, 22), memory=states[0], **GREEDY)
    monkeypatch.setattr(Llama, "n_batch", 4)
    with pytest.raises(ValueError, match="n_batch=4"):
        reader.generate(tokens(1, 4), memory=states[0], **GREEDY)
    monkeypatch.undo()


def test_another_model_and_a_failed_decode_are_errors(model, llama, monkeypatch):
    state, reader = model.write(tokens(1, 9)), LlamaCppReader(model, llama, check_model=False)
    llama.module.status = 1
    with pytest.raises(RuntimeError, match="returned 1"):
        reader.generate(tokens(1, 4), memory=state, **GREEDY)
    assert llama.module.calls[-1] == "free"
    monkeypatch.setattr(Llama, "n_embd", lambda self: 48)
    with pytest.raises(ValueError, match="GGUF model needs 48"):
        reader.generate(tokens(1, 4), memory=state, **GREEDY)


def test_one_reader_at_a_time_uses_the_engine(model, llama):
    at_once(lambda: LlamaCppReader(model, llama, check_model=False), llama, "eval", model.write(tokens(1, 9)))
