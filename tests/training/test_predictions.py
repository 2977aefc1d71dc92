"""What `predict` returns and `compute_metrics` is given: a row for each query, as in Transformers' trainers."""

import numpy as np
import pytest
import torch
from test_trainer import LORA, arguments, make, rows, trainer
from tiny import tiny_tokenizer

from gradmem_adapter.training import GradMemCollator, GradMemTrainer


@pytest.mark.parametrize("size", [2, 5])
def test_predictions_are_the_answers_and_label_ids_the_targets(tmp_path, size):
    """Contexts have one to three queries, with answers and targets of different lengths in each batch."""
    data, tokenizer, answered = rows(5, queries=3), tiny_tokenizer(), []
    run = trainer(
        make(lora_config=LORA), tmp_path, score=lambda answer, _: answered.append(answer) or {"words": 0.0},
        per_device_eval_batch_size=size,
    )  # fmt: skip
    found = run.predict(data)
    assert found.predictions.shape == (9, run._new_tokens)
    assert tokenizer.batch_decode(found.predictions, skip_special_tokens=True) == answered
    labels = np.where(found.label_ids == -100, tokenizer.pad_token_id, found.label_ids)
    targets = [target for row in data for target in row["targets"]]
    assert tokenizer.batch_decode(labels, skip_special_tokens=True) == targets
    assert found.metrics["test_words"] == 0


def test_queries_may_come_in_any_order(tmp_path):
    """A custom collator may return them so; rows are assigned by their contexts."""

    class Backwards(GradMemCollator):
        def __call__(self, rows, first=0):
            batch = super().__call__(rows, first)
            for name in ("input_ids", "attention_mask", "labels", "context_index", "query_input_ids"):
                batch[name] = batch[name].flip(0)
            batch["query_attention_mask"] = batch["query_attention_mask"].flip(0)
            return batch | {"targets": batch["targets"][::-1]}

    class Once(GradMemTrainer):
        def __init__(self, collator):
            super().__init__(
                make(), arguments(tmp_path, generation_max_new_tokens=4), collator, processing_class=tiny_tokenizer()
            )

    # One query per context, so that the order within a context does not matter.
    found = [Once(collator(tiny_tokenizer())).predict(rows(3)) for collator in (GradMemCollator, Backwards)]
    assert np.array_equal(found[0].predictions, found[1].predictions)
    assert np.array_equal(found[0].label_ids, found[1].label_ids)


@pytest.mark.parametrize("by_batch", [False, True])
def test_compute_metrics_adds_to_the_score(tmp_path, by_batch):
    """And replaces it where a name is the same."""
    seen = []

    def compute_metrics(found, compute_result=True):
        seen.append(found)
        return {"queries": len(found.predictions), "f1": 7.0}

    run = trainer(
        make(), tmp_path, evaluation=rows(3, queries=2), compute_metrics=compute_metrics, batch_eval_metrics=by_batch,
        include_for_metrics=["inputs"],
    )  # fmt: skip
    metrics = run.evaluate()
    assert {"eval_loss", "eval_exact_match"} <= metrics.keys()
    assert metrics["eval_f1"] == 7
    assert metrics["eval_queries"] == (1 if by_batch else 4)  # of the last batch of two
    assert [len(found.label_ids) for found in seen] == ([3, 1] if by_batch else [4])
    if not by_batch:
        assert len(seen[0].inputs) == 4
    assert run.predict(rows(3, queries=2)).metrics["test_f1"] == 7


def test_without_generation_predictions_are_logits(tmp_path):
    data = rows(3, queries=2)
    batch = GradMemCollator(tiny_tokenizer())(data)
    run = GradMemTrainer(
        make(), arguments(tmp_path, predict_with_generate=False), processing_class=tiny_tokenizer(),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda found: {"places": (found.label_ids != -100).sum()},
    )  # fmt: skip
    found = run.predict(data)
    assert torch.equal(torch.tensor(found.label_ids), batch["labels"])
    inputs = {name: batch[name] for name in batch if not name.startswith("query_") and name != "targets"}
    with torch.no_grad():
        expected = run.model.eval()(**inputs).logits.argmax(-1)
    counts = batch["attention_mask"].bool()
    assert torch.equal(torch.tensor(found.predictions)[counts], expected[counts])
    assert found.metrics["test_places"] == (batch["labels"] != -100).sum()


def test_a_label_at_the_first_position_counts(tmp_path):
    """It is predicted from the memory; `GradMemCollator` has no such labels, but a custom collator may."""

    class Everything(GradMemCollator):
        def __call__(self, rows, first=None):
            batch = super().__call__(rows, first)
            return batch | {"labels": batch["input_ids"].where(batch["attention_mask"].bool(), -100)}

    run = GradMemTrainer(
        make(), arguments(tmp_path, predict_with_generate=False, per_device_eval_batch_size=3),
        Everything(tiny_tokenizer()), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    data = rows(3)
    with torch.no_grad():
        expected = run.compute_loss(run.model.eval(), run._prepare_inputs(run.data_collator(data)))
    assert run.evaluate(data)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_prediction_loss_only_returns_no_predictions(tmp_path):
    found = trainer(make(), tmp_path, prediction_loss_only=True).predict(rows(3))
    assert found.predictions is None
    assert found.label_ids is None
    assert "test_exact_match" in found.metrics
