"""What engines are asked: 50 questions on 10 texts, and the states of these texts."""

from __future__ import annotations

from pathlib import Path

from gradmem_adapter import GradMemPipeline, MemoryState

TEXT = (Path(__file__).parents[1] / "data" / "wikitext.txt").read_text(encoding="utf-8")
QUESTIONS = (
    "What is the text about?",
    "What colour is it?",
    "Where does it live?",
    "When does it happen?",
    "How large is it?",
)
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 0}
"""Answers do not end at the usual token, so that all tokens are compared, even those after a refusal."""


def asked(pipeline: GradMemPipeline, texts: int = 10) -> tuple[list[str], MemoryState]:
    """Questions, and the state of each."""
    segments = [segment.text for segment in pipeline.segments(TEXT, 128)][:texts]
    states = pipeline.write_many(segments, progress=False)
    each = len(QUESTIONS)
    return list(QUESTIONS) * texts, states[[i // each for i in range(texts * each)]]
