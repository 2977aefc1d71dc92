"""Natural text: passages, what comes back of them, and the text that follows."""

import gzip
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer, tokens

from gradmem_adapter import GradMemConfig
from gradmem_adapter.tasks.reconstruction import Estimate, next_chunk, passages, reconstruction
from gradmem_adapter.utils.files import read_text

TEXT = Path(__file__).parent / "data" / "wikitext.txt"


@pytest.fixture(scope="module")
def model():
    config = GradMemConfig(num_memory_tokens=4, memory_init_std=0.5, write_lr=0.1, write_optimizer="adam")
    return get_peft_model(tiny(), config).eval()


def test_passages_are_consecutive_prose_without_headings(tmp_path):
    text = f" = Title = \n\n{tiny_text(10)}\n = = Part = = \n{tiny_text(7, seed=1)}\n"
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"{tiny_text(10)} {tiny_text(7, seed=1)}")["input_ids"]
    assert passages(text, tokenizer, 4) == [ids[i : i + 4] for i in (0, 4, 8, 12)]
    assert passages(text, tokenizer, 4, 2) == [ids[:4], ids[4:8]]
    with pytest.raises(ValueError, match="17 tokens: 4 passages of 4, not 5"):
        passages(text, tokenizer, 4, 5)
    with pytest.raises(ValueError, match="not one"):
        passages(text, tokenizer, 18)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(TEXT.read_bytes()))
    assert read_text(tmp_path / "t.txt.gz") == read_text(TEXT)
    assert "Homarus" in read_text(TEXT)


def test_estimates():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert estimate.mean == 3
    assert estimate.error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert math.isnan(Estimate.of(torch.tensor([1.0])).error)


def test_reconstruction_is_the_models_fidelity(model):
    rows = tokens(18, 7).tolist()
    few, many = (reconstruction(model, rows, steps=steps, lr=0.05) for steps in (1, 60))
    state = model.write(torch.tensor(rows), steps=60, lr=0.05)
    fidelity = model.fidelity(state, torch.tensor(rows))
    assert many.greedy.mean == pytest.approx(fidelity.greedy.double().mean().item(), abs=0.02)
    assert many.teacher_forced.mean == pytest.approx(fidelity.teacher_forced.double().mean().item(), abs=0.02)
    assert many.write_loss.mean < few.write_loss.mean
    assert many.greedy.mean > few.greedy.mean
    assert 0 <= many.whole.mean <= many.greedy.mean <= 1
    assert many.greedy_tokens == pytest.approx((7 * many.greedy.mean, 7 * many.greedy.error))


def test_passages_of_several_lengths_are_measured_each_by_its_own(model):
    rows = [ids[:length] for ids, length in zip(tokens(18, 9).tolist(), [9, 5, 3] * 6, strict=True)]
    found = reconstruction(model, rows, steps=60, lr=0.05)
    shares = []
    for row in rows:
        ids = torch.tensor([row])
        shares.append(model.fidelity(model.write(ids, steps=60, lr=0.05), ids).greedy.item())
    assert found.greedy.mean == pytest.approx(sum(shares) / 18, abs=0.02)
    counts = [share * len(row) for share, row in zip(shares, rows, strict=True)]
    assert found.greedy_tokens.mean == pytest.approx(sum(counts) / 18, abs=0.1)
    assert found.greedy_tokens.mean > 0


def test_next_chunk_is_the_loss_of_what_follows(model):
    pairs = [(a, b) for a, b in zip(tokens(18, 6).tolist(), tokens(18, 5, seed=1).tolist(), strict=True)]
    pairs[1:3] = [(pairs[1][0][:3], pairs[1][1]), (pairs[2][0], pairs[2][1][:2])]  # padding must not count
    found = next_chunk(model, pairs, steps=2)
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
    for estimate, values in zip(found, zip(*expected, strict=True), strict=True):
        assert estimate.mean == pytest.approx(sum(values) / 18, rel=1e-4)
        assert estimate.error > 0


def test_a_next_chunk_needs_a_token_that_counts(model):
    with pytest.raises(ValueError, match="second passage of pair 1 has 1 tokens"):
        next_chunk(model, [([3, 4], [5, 6]), ([3, 4], [5])], steps=1)
