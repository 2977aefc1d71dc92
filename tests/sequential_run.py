"""Writes a text of many tokens into one state, in its own process; prints the memory that took, in KiB."""

import itertools
import random
import resource
import sys

from peft import get_peft_model
from tiny import WORDS, tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline, WriteOptions
from gradmem_adapter.sequential import write_sequential
from gradmem_adapter.write import fidelity


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


tokens, limit, fidelity.CONFIDENT = int(sys.argv[1]), 512, 0.0  # whatever memory recites is rehearsed
config = GradMemConfig(num_memory_tokens=4, write_steps=1, write_lr=0.3, trained_length=limit)
pipeline = GradMemPipeline(get_peft_model(tiny(max_position_embeddings=1024), config).eval(), tiny_tokenizer())
pipeline.model.generation_config.eos_token_id = None
before = peak()
draw = random.Random(0)
words = (f"{draw.choice(WORDS)} " for _ in itertools.repeat(None, tokens))
segments = pipeline.segments(words, limit - 16, 0)
state = write_sequential(pipeline, segments, WriteOptions(last_loss=False))
print(peak() - before, int(state.context_tokens), bool(state.vectors.isfinite().all()))
