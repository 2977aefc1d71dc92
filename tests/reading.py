"""Helpers that tests of READ share."""

import torch
from peft import get_peft_model
from tiny import tiny, tokens
from torch.nn import functional as F
from transformers.generation.streamers import BaseStreamer

from gradmem_adapter import GradMemConfig


def make(architecture="llama", **config):
    """A model whose memory matters: control vectors, projection and slots of the size of its embeddings."""
    defaults = {"num_memory_tokens": 3, "write_lr": 0.3, "num_control_tokens": 1, "memory_projection": "shared"}
    backbone = tiny(architecture)
    scale = float(backbone.get_input_embeddings()(torch.arange(3, 20)).std())
    return get_peft_model(backbone, GradMemConfig(memory_init_std=scale, **defaults | config)).eval()


class Collect(BaseStreamer):
    """Keeps the tokens that it is given."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        pass


def pad_left(rows, length=None):
    length = length or max(map(len, rows))
    ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])


def pad_right(rows, length):
    ids = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (0, length - len(row))) for row in rows])


def greedy_without_cache(model, state, prompt, count):
    """Step-by-step argmax over whole forward passes."""
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, memory=state).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0]


ROWS = [tokens(1, n, seed=n)[0] for n in (6, 2, 4)]
