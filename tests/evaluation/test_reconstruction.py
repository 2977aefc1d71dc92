"""Natural text: passages, how much of them is reconstructed, and the text that follows."""

import gzip
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer, tokens

from evaluation.config import RunConfig
from evaluation.data import cut_passages
from evaluation.run import Answerer
from evaluation.scores import standard_error
from evaluation.tasks import Reconstruction
from evaluation.tasks.reconstruction import predicted, recited
from gradmem_adapter import GradMemConfig
from gradmem_adapter.utils.files import read_text

TEXT = Path(__file__).parent.parent / "data" / "wikitext.txt"


@pytest.fixture(scope="module")
def model():
    config = GradMemConfig(num_memory_tokens=4, memory_init_std=0.5, write_lr=0.1, write_optimizer="adam")
    return get_peft_model(tiny(), config).eval()


def test_passages_are_consecutive_prose_without_headings(tmp_path):
    text = f" = Title = \n\n{tiny_text(10)}\n = = Part = = \n{tiny_text(7, seed=1)}\n"
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"{tiny_text(10)} {tiny_text(7, seed=1)}")["input_ids"]
    assert cut_passages(text, tokenizer, 4) == [ids[i : i + 4] for i in (0, 4, 8, 12)]
    assert cut_passages(text, tokenizer, 4, 2) == [ids[:4], ids[4:8]]
    with pytest.raises(ValueError, match="17 tokens, enough for 4 passages of 4, not for 5"):
        cut_passages(text, tokenizer, 4, 5)
    with pytest.raises(ValueError, match="not for one"):
        cut_passages(text, tokenizer, 18)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(TEXT.read_bytes()))
    assert read_text(tmp_path / "t.txt.gz") == read_text(TEXT)
    assert "Homarus" in read_text(TEXT)


def test_standard_error_of_a_mean():
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(math.sqrt(14 / 3) / 2)
    assert standard_error(torch.tensor([1.0])) == 0


def recall(model, rows, **options):
    """The means over all passages."""
    state = model.write_many(rows, progress=False, **options)
    return {name: values.double().mean().item() for name, values in recited(model, rows, state).items()}


def test_reconstruction_equals_the_models_fidelity(model):
    rows = tokens(18, 7).tolist()
    few, many = (recall(model, rows, steps=steps, lr=0.05) for steps in (1, 60))
    state = model.write(torch.tensor(rows), steps=60, lr=0.05)
    fidelity = model.fidelity(state, torch.tensor(rows))
    assert many["greedy"] == pytest.approx(fidelity.greedy.double().mean().item(), abs=0.02)
    assert many["teacher_forced"] == pytest.approx(fidelity.teacher_forced.double().mean().item(), abs=0.02)
    assert many["write_loss"] < few["write_loss"]
    assert many["greedy"] > few["greedy"]
    assert 0 <= many["whole"] <= many["greedy"] <= 1
    assert many["greedy_tokens"] == pytest.approx(7 * many["greedy"])


def test_passages_of_several_lengths_are_each_measured_by_their_own_length(model):
    rows = [ids[:length] for ids, length in zip(tokens(18, 9).tolist(), [9, 5, 3] * 6, strict=True)]
    found = recall(model, rows, steps=60, lr=0.05)
    shares = []
    for row in rows:
        ids = torch.tensor([row])
        shares.append(model.fidelity(model.write(ids, steps=60, lr=0.05), ids).greedy.item())
    assert found["greedy"] == pytest.approx(sum(shares) / 18, abs=0.02)
    counts = [share * len(row) for share, row in zip(shares, rows, strict=True)]
    assert found["greedy_tokens"] == pytest.approx(sum(counts) / 18, abs=0.1)
    assert found["greedy_tokens"] > 0


def test_the_loss_of_the_next_passage_is_measured(model):
    pairs = [(a, b) for a, b in zip(tokens(18, 6).tolist(), tokens(18, 5, seed=1).tolist(), strict=True)]
    pairs[1:3] = [(pairs[1][0][:3], pairs[1][1]), (pairs[2][0], pairs[2][1][:2])]  # padding must not count
    found = predicted(model, pairs, model.write_many([first for first, _ in pairs], progress=False, steps=2))
    expected = []
    for first, second in pairs:
        state = model.write(torch.tensor([first]), steps=2)
        ids = torch.tensor([second])
        labels = ids.clone()
        labels[:, 0] = -100  # without memory nothing predicts the first token
        with torch.no_grad():
            expected.append(
                [
                    model(input_ids=ids, labels=labels, memory=state).loss.item(),
                    model(input_ids=ids, labels=labels).loss.item(),
                    model(
                        input_ids=torch.tensor([first + second]),
                        labels=torch.cat([torch.full((1, len(first) + 1), -100), ids[:, 1:]], 1),
                    ).loss.item(),
                ]
            )
    for losses, values in zip(found.values(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(losses, torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_a_next_passage_needs_at_least_two_tokens(model):
    with pytest.raises(ValueError, match="second passage of pair 1 must have at least 2 tokens, got 1 token"):
        predicted(model, [([3, 4], [5, 6]), ([3, 4], [5])], model.write(tokens(2, 3), steps=1))


class TestTask:
    @pytest.fixture
    def answerer(self, model):
        config = RunConfig.of({"tasks": [{"name": "plain_text", "source": "x"}], "backbone": "x"})
        return Answerer(model, tiny_tokenizer(), config, steps=2, checkpoint="mine")

    @pytest.fixture
    def text(self, tmp_path):
        (tmp_path / "t.txt").write_text(tiny_text(110))
        return str(tmp_path / "t.txt")

    def test_recital_and_the_next_passage_are_measured(self, answerer, text):
        task = Reconstruction(text=text, tokens=7, passages=10, optimizer="sgd", lr=0.3)
        found = task.measure(answerer, "test")
        assert {len(values) for values in found.values.values()} == {10, 9}
        assert found.settings == {"checkpoint": "mine"}
        assert (task.dataset, task.settings["optimizer"], task.settings["lr"]) == ("t.txt", "sgd", 0.3)
        other = Reconstruction(text=text, tokens=7, passages=10).measure(answerer, "test")
        assert not torch.equal(other.values["write_loss"], found.values["write_loss"])

    @pytest.mark.parametrize(("tokens", "fits"), [(48, True), (49, False)])
    def test_the_next_passage_is_left_out_if_two_do_not_fit(self, answerer, text, tokens, fits):
        assert answerer.model.positions == 96
        found = Reconstruction(text=text, tokens=tokens, passages=2).measure(answerer, "test")
        assert ("next_memory" in found.values) is fits

    def test_a_single_passage_has_no_next_one(self, answerer, text):
        assert "next_text" not in Reconstruction(text=text, tokens=9, passages=1).measure(answerer, "test").values

    def test_other_methods_and_training_are_refused(self, answerer, text):
        import dataclasses

        with pytest.raises(TypeError, match="needs the method gradmem"):
            Reconstruction(text=text).measure(dataclasses.replace(answerer, model=tiny()), "test")
        with pytest.raises(ValueError, match="For training, use plain_text"):
            Reconstruction(text=text).rows("train")
