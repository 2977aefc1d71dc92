"""The text that follows a passage: predicted from its memory, from nothing, and from its text."""

from pathlib import Path

import pytest
import torch
from adapters import lora
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer, tokens

from evaluation.config import RunConfig
from evaluation.run import Answerer
from evaluation.tasks import Continuation
from evaluation.tasks.continuation import losses
from gradmem_adapter import GradMemConfig

TEXT = Path(__file__).parent.parent / "data" / "wikitext.txt"


def nats(logits, ids):
    return float(torch.nn.functional.cross_entropy(logits[0], ids[0]))


def test_losses_equal_those_of_the_model():
    model, rows = tiny(), tokens(3, 12)
    found = losses(model, torch.zeros(3, 0, 32), rows[:, :7].tolist(), rows[:, 7:].tolist())
    expected = [nats(model(row[None]).logits[:, 7:-1], row[None, 8:]) for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_the_gap_that_memory_closes_is_measured():
    """Without memory and with the text it is the backbone alone; memory closes a share of the gap."""
    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, lora_config=lora())
    model = get_peft_model(tiny(), config).eval()
    task = Continuation(text=str(TEXT), tokens=6, next_tokens=5, passages=4)
    run = RunConfig.of({"backbone": "none", "tasks": [{"name": "continuation", "text": str(TEXT)}]})
    found = task.measure(Answerer(model, tiny_tokenizer(), run, steps=1, checkpoint="tiny"), "test")
    values = found.values
    assert all(len(value) == 4 for value in values.values())
    assert found.settings == {"checkpoint": "tiny"}
    plain = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3)).eval()
    other = task.measure(Answerer(plain, tiny_tokenizer(), run, steps=0), "test").values
    assert torch.equal(values["next_nothing"], other["next_nothing"])
    assert torch.equal(values["next_text"], other["next_text"])
    gap = (values["next_nothing"] - values["next_text"]).mean()
    share = (values["next_nothing"] - values["next_memory"]).mean() / gap
    assert float(values["gap_closed"].mean()) == pytest.approx(float(share), rel=1e-4)


def test_other_methods_and_training_are_refused():
    run = RunConfig.of(
        {"backbone": "none", "method": {"name": "full_context"}, "tasks": [{"name": "babi", "source": "", "number": 1}]}
    )
    with pytest.raises(TypeError, match="needs the method gradmem"):
        Continuation(text=str(TEXT)).measure(Answerer(tiny(), tiny_tokenizer(), run, steps=0), "test")
    with pytest.raises(ValueError, match="can only be measured"):
        Continuation(text=str(TEXT)).rows("train")
