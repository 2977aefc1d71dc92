"""Distillation: a teacher that reads text, its distributions as targets, and a training step with them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import LORA, gradients, logs, make, trainer
from tiny import rows, tiny, tiny_tokenizer
from torch.nn import functional as F

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.training import GradMemCollator, RowBatches
from gradmem_adapter.training.distillation import Distillation

CPU = torch.device("cpu")
COLLATOR = GradMemCollator(tiny_tokenizer())


def collated():
    """Contexts of several lengths with one, two and three queries."""
    made = [*rows(2, 9), *rows(1, 14, seed=50), *rows(1, 6, seed=70)]
    made[0] = made[0] | {name: made[0][name][:1] for name in ("queries", "targets", "answers")}
    made[2] = made[2] | {name: made[2][name] + made[1][name][:1] for name in ("queries", "targets", "answers")}
    return COLLATOR(made)


def plain_logits(teacher, batch, context):
    """The teacher's logits before the targets of each query, each read by itself after the tokens of its context."""
    found = []
    for row in range(len(batch["input_ids"])):
        ids, labels = (batch[name][row][batch["attention_mask"][row].bool()] for name in ("input_ids", "labels"))
        text = context(row)
        logits = teacher(input_ids=torch.cat([text, ids])[None]).logits[0, len(text) :]
        places = (labels != IGNORED).nonzero()[:, 0]
        found.append(logits[places - 1])
    return found


def own_context(batch):
    mask = batch["context_attention_mask"].bool()
    return lambda row: batch["context_input_ids"][i := batch["context_index"][row]][mask[i]]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt"])
def test_sharing_a_context_does_not_change_what_a_query_is_taught(architecture):
    teacher, batch = tiny(architecture), collated()
    taught = Distillation(teacher, tiny(architecture, seed=1), 1.0).teach(batch)["taught"]
    head = teacher.get_output_embeddings()
    for states, expected in zip(taught, plain_logits(teacher, batch, own_context(batch)), strict=True):
        if architecture == "opt":  # which projects its hidden states before the head
            states = states[..., : head.weight.shape[1]]
        torch.testing.assert_close(head(states)[: len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("trained", [{"lora_config": LORA}, {"train_backbone": True}])
def test_value_and_gradients_match_plain_torch(temperature, trained):
    teacher, batch, model = tiny(seed=3), collated(), make(**trained)
    distillation = Distillation(teacher, model, temperature)
    inputs = {name: batch[name] for name in batch if not name.startswith("query_") and name != "targets"}
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    prepared = distillation.teach(batch)
    output = model(**inputs, max_targets=prepared["max_targets"], write_steps=1)
    found = distillation.divergence(output, prepared)

    logits = model(**inputs, write_steps=1).logits
    expected = torch.zeros(())
    for row, theirs in enumerate(plain_logits(teacher, batch, own_context(batch))):
        ours = logits[row, (batch["labels"][row] != IGNORED).nonzero()[:, 0] - 1]
        p, q = (F.log_softmax(x / temperature, -1) for x in (theirs.detach(), ours))
        expected = expected + temperature**2 * (p.exp() * (p - q)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pairs = (torch.autograd.grad(value, weights, allow_unused=True) for value in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item() + 1e-7)


def test_the_divergence_of_a_model_from_itself_is_zero():
    teacher, batch = tiny(), collated()
    distillation = Distillation(teacher, tiny(), 1.0)
    prepared = distillation.teach(batch)
    output = type("Output", (), {"target_states": prepared["taught"]})
    assert distillation.divergence(output, prepared).item() == pytest.approx(0, abs=1e-4)


def test_states_side_by_side_are_taught_by_the_text_that_answers():
    teacher = tiny()
    batch = RowBatches(rows(6, 9), COLLATOR, contexts=4, side_by_side=[3]).batch(0, CPU)
    prepared = Distillation(teacher, tiny(seed=1), 1.0).teach(batch)
    own = own_context(batch | {"context_index": batch["text_index"]})
    for states, expected in zip(prepared["taught"], plain_logits(teacher, batch, own), strict=True):
        logits = teacher.get_output_embeddings()(states)[: len(expected)]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    del batch["text_index"]
    with pytest.raises(ValueError, match="needs text_index"):
        Distillation(teacher, tiny(seed=1), 1.0).teach(batch)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}])
def test_a_step_adds_the_divergence_per_target_token(tmp_path, options):
    data = RowBatches(rows(6, 9), COLLATOR, contexts=3)
    teacher, model = tiny(seed=3), make(lora_config=LORA)
    arguments = {"distillation_weight": 0.5, "distillation_temperature": 2.0, **options}
    found, run = gradients(model, tmp_path, data, teacher=teacher, **arguments)

    model, batch = make(lora_config=LORA), data.batch(0, CPU)
    distillation = Distillation(teacher, model, 2.0)
    prepared = distillation.teach(batch)
    output = model(
        **{n: v for n, v in batch.items() if n != "text_index"}, write_steps=model.active_peft_config.write_steps
    )
    tokens = (batch["labels"] != IGNORED).sum()
    divergence = distillation.divergence(output, prepared) / tokens
    (output.loss + 0.5 * divergence).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert logs(run, "distillation_loss")[0] == pytest.approx(divergence.item(), rel=1e-4)
    assert not logs(gradients(model, tmp_path / "alone", data)[1], "distillation_loss")
    assert logs(run, "loss")[0] == pytest.approx((output.loss + 0.5 * divergence).item(), rel=1e-4)


def test_training_brings_the_student_closer_to_the_teacher(tmp_path):
    teacher = get_peft_model(tiny(seed=3), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = trainer(
        make(train_backbone=True, meta_gradient="first_order"), tmp_path, rows(4, 9), teacher=teacher, max_steps=25,
        per_device_train_batch_size=4, learning_rate=3e-3, distillation_weight=50.0,
    )  # fmt: skip
    run.train()
    assert logs(run, "distillation_loss")[-1] < 0.7 * logs(run, "distillation_loss")[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (lambda model: model.get_base_model(), ValueError, "Load it a second time"),
        (lambda model: tiny("mistral"), ValueError, "attention windows"),
        (lambda model: tiny(vocab_size=67), ValueError, "predicts 67 tokens and the student 61"),
        (lambda model: torch.nn.Linear(2, 2), TypeError, "must be a causal LM of Transformers, got Linear"),
    ],
)
def test_unsuitable_teachers_are_refused(teacher, error, message):
    model = make()
    assert isinstance(model, PeftModel)
    with pytest.raises(error, match=message):
        Distillation(teacher(model), model, 1.0)
