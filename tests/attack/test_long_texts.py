"""Texts that cannot fit are refused before they are tokenised as a whole."""

import pytest
from tiny import tiny_text, tiny_tokenizer
from tiny_pipeline import tiny_pipeline

from gradmem_adapter.training import GradMemCollator

LONG = tiny_text(1000) + " " + "w1 " * 16_000_000  # 48 MB, 200 s of SmolLM2's tokenizer


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return self.tokenizer(text, **options)


@pytest.fixture
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.tokenizer = Counting(pipeline.tokenizer)
    return pipeline


def test_long_texts_and_prompts_are_refused_early(pipeline):
    state = pipeline.write("w1 w2")
    for attempt in (
        lambda: pipeline.write(LONG),
        lambda: pipeline.write_many(["w1", LONG]),
        lambda: pipeline.generate(LONG, memory=state),
        lambda: next(pipeline.stream(LONG, memory=state)),
        lambda: pipeline.fidelity(LONG, state),
    ):
        with pytest.raises(ValueError, match=r"^(Context|Prompt) [01] is too long: the first 2,\d+ of its 48,"):
            attempt()
    assert pipeline.tokenizer.characters < 100_000


def test_long_training_rows_are_refused_early():
    tokenizer = Counting(tiny_tokenizer())
    collator = GradMemCollator(tokenizer, max_context_length=100)
    with pytest.raises(ValueError, match=r"Row 1 of the batch .*: the context is too long"):
        collator([{"context": text, "query": "w1", "target": "w2"} for text in ("w1", LONG)])
    assert tokenizer.characters < 100_000


def test_long_texts_of_few_tokens_are_tokenised_completely(pipeline):
    """However many characters there are per token."""
    longest = pipeline.max_context_tokens
    spaces = " " * 100
    assert len(pipeline.write(spaces.join(["w1"] * longest))) == 1
    with pytest.raises(ValueError, match=f"has {longest + 1} tokens, but at most {longest} are allowed"):
        pipeline.write(spaces.join(["w1"] * (longest + 1)))
