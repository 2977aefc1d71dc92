"""Numbers with what they count, in messages."""

import pytest
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline
from gradmem_adapter.segments import segments
from gradmem_adapter.training.collator import read_row
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.plan import Plan


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(1, "token", "1 token"), (0, "token", "0 tokens"), (2, "memory state", "2 memory states"), (1, "query", "1 query"),
     (2, "query", "2 queries"), (3, "key", "3 keys"), (1024, "pass", "1,024 passes"), (2, "batch", "2 batches")],
)  # fmt: skip
def test_a_noun_agrees_with_its_number(number, noun, said):
    assert counted(number, noun) == said


def test_messages_use_singular_and_plural():
    """They once said "1 tokens", "1 queries", "1 states" and "1 layers"."""
    with pytest.raises(ValueError, match="at least 1 token, 0 of them"):
        list(segments("a text", tiny_tokenizer(), 0))
    with pytest.raises(ValueError, match=r"has 1 query, 2 targets and references for 2\. Each"):
        read_row("Row 0", {"context": "a", "queries": ["b"], "targets": ["c", "d"]})
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2)).eval()
    pipeline = GradMemPipeline(model, tiny_tokenizer())
    state = pipeline.write("w1 w2 w3")
    with pytest.raises(IndexError, match="Index 3 is out of range for 1 memory state"):
        state[3]
    with pytest.raises(ValueError, match=r"Got 2 contexts for 1 state\. Pass one"):
        pipeline.model.fidelity(state, *pipeline.encode_contexts(["w1 w2", "w3"]))
    assert str(Plan(2, 1)) == "2 contexts at a time, 1 layer recomputed in the backward pass"
