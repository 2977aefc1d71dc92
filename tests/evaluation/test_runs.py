"""Runs of every method: built, trained by the Trainer, saved, opened, and answering."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from accelerate import PartialState
from small_runs import METHODS, kv_config, kv_fields, qa_config, qa_fields, write_folder
from tiny import tiny, tiny_tokenizer

from evaluation.config import RunConfig
from evaluation.data import questions
from evaluation.models import RECIPE, build_model, language_model, load_model, load_teacher, save_model
from evaluation.run import Answerer
from evaluation.train import train, training_arguments, training_batches
from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.training import GradMemTrainer, RowBatches
from gradmem_adapter.utils.fields import claimed

CPU = torch.device("cpu")
IDS = ["gradmem", "forward_memory", "mean_pooling", "truncated_text", "no context", "full_context"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("qa"))


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_method_is_trained_saved_and_answers(folder, tmp_path, method):
    config = qa_config(folder, method)
    before = dict(build_model(config)[0].named_parameters())
    checkpoint = train(config, tmp_path / "run", CPU)
    model, tokenizer, saved = load_model(checkpoint)
    assert saved.trained_minutes is not None
    assert dataclasses.replace(saved, trained_minutes=None) == config
    after = dict(model.named_parameters())
    changed = {name for name in before if not torch.allclose(before[name], after[name])}
    assert changed
    assert changed <= {name for name, parameter in before.items() if parameter.requires_grad}
    contexts, queries, index, references = questions(config.tasks[0].rows("test"))
    assert len(queries) == len(references) == 12
    for reads in ([[i] for i in index], [[i, (i + 1) % 6] for i in index]):
        answerer = Answerer(model, tokenizer, config, 2)
        answers = answerer.answer(contexts, queries, reads, max_new_tokens=3)
        assert len(answers) == 12
        alone = answerer.answer(
            [contexts[i] for i in reads[5]], queries[5:6], [list(range(len(reads[5])))], max_new_tokens=3
        )
        assert alone == [answers[5]]


@pytest.mark.parametrize("method", [{"name": "gradmem"}, {"name": "forward_memory"}, {"name": "full_context"}])
def test_key_value_retrieval_is_trained_in_stages_and_measured(tmp_path, method):
    config = kv_config(method)
    checkpoint = train(config, tmp_path / "run", CPU)
    model, tokenizer, saved = load_model(checkpoint)
    assert saved.training["max_steps"] == 8
    start = build_model(config)[0].state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items() if name in start)
    found = config.evaluation.tasks[0].measure(Answerer(model, tokenizer, saved, 1), "test")
    assert found.values["exact_match"].shape == (4 * 4,)
    if method["name"] == "gradmem":
        assert model.active_peft_config.trained_length == 4 * len("!ab:cd!") + len("|")


def test_an_interrupted_run_continues_as_if_it_had_not_been(folder, tmp_path, monkeypatch):
    whole = load_model(train(qa_config(folder), tmp_path / "whole", CPU))[0]
    step = GradMemTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GradMemTrainer, "training_step", interrupted)
    assert train(qa_config(folder), tmp_path / "parts", CPU) is None
    monkeypatch.undo()
    assert (tmp_path / "parts" / "checkpoint-4").is_dir()
    parts = load_model(train(qa_config(folder), tmp_path / "parts", CPU))[0]
    for (name, value), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7, msg=name)


def test_training_can_start_from_a_checkpoint(tmp_path):
    model, tokenizer = build_model(kv_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    save_model(model, tokenizer, kv_config(), tmp_path / "first")
    started, _ = build_model(kv_config(init_from=str(tmp_path / "first")))
    for (name, value), other in zip(model.named_parameters(), started.named_parameters(), strict=True):
        assert torch.equal(value, other[1]), name


def teacher_run(folder, path, **changes):
    return train(qa_config(folder, {"name": "full_context"}, **changes), path, CPU)


def test_a_lora_can_start_from_that_of_the_full_context(folder, tmp_path):
    path = teacher_run(folder, tmp_path / "full")
    theirs = dict(language_model(load_model(path)[0]).named_parameters())
    model, _ = build_model(qa_config(folder, init_from=str(path)))
    loras = {name: weight for name, weight in language_model(model).named_parameters() if ".lora_" in name}
    assert loras
    assert all(torch.equal(weight, theirs[name]) for name, weight in loras.items())
    fields = qa_fields(folder, init_from=str(path))
    fields["memory"] = fields["memory"] | {"lora_config": {"r": 3, "target_modules": ["q_proj"]}}
    with pytest.raises(ValueError, match="does not match the model"):
        build_model(RunConfig.of(fields))


def test_a_run_can_have_a_teacher(folder, tmp_path):
    fields = qa_fields(folder)
    path = teacher_run(folder, tmp_path / "full")
    teacher = load_teacher(qa_config(folder, teacher=str(path)), torch.float32)
    full, tokenizer, config = load_model(path)
    batch = training_batches(config, tokenizer).batch(0, CPU)
    ids = batch["input_ids"]
    unmerged = full.backbone(input_ids=ids).logits
    torch.testing.assert_close(teacher(input_ids=ids).logits, unmerged, rtol=1e-4, atol=1e-4)
    assert load_teacher(config, torch.float32) is None

    fields["batches"] |= {"side_by_side": [1, 2, [3, 2]]}
    made = RunConfig.of(fields | {"teacher": str(path), "init_from": str(path)})
    model, _, saved = load_model(train(made, tmp_path / "student", CPU))
    assert saved.teacher == str(path)
    assert model.active_peft_config.trained_length == 14
    curve = [json.loads(line) for line in (tmp_path / "student" / "learning_curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [2, 4, 6, 6]
    assert all(line["distillation_loss"] > 0 for line in curve[:3])
    with pytest.raises(ValueError, match="is of gradmem"):
        load_teacher(qa_config(folder, teacher=str(tmp_path / "student" / "checkpoint")), torch.float32)


def test_a_saved_adapter_answers_as_the_pipeline_does(folder, tmp_path):
    config = qa_config(folder)
    save_model(*build_model(config), config, tmp_path / "model")
    model, tokenizer = load_checkpoint(tmp_path / "model")
    row = config.tasks[0].rows("test")[0]
    answer = Answerer(model, tokenizer, config, 2).answer([row["context"]], row["queries"][:1], [[0]], max_new_tokens=4)
    state = model.write(torch.tensor([tokenizer(row["context"])["input_ids"]]), steps=2)
    expected = GradMemPipeline(model, tokenizer).generate(row["queries"][0], memory=state, max_new_tokens=4)
    assert answer == [expected[0].strip()]


def test_rows_of_all_tasks_are_mixed_by_their_shares(folder):
    config = qa_config(folder)
    batches = training_batches(config, tiny_tokenizer())
    assert isinstance(batches, RowBatches)
    assert [pool.share for pool in batches.pools] == pytest.approx([0.75, 0.25])
    full = training_batches(qa_config(folder, {"name": "full_context"}), tiny_tokenizer())
    assert full.tokens == batches.tokens // 2, "the whole context stands before each of two queries"


def test_a_task_with_its_own_batches_cannot_be_mixed(folder):
    fields = kv_fields()
    fields["tasks"] = [*fields["tasks"], {"name": "passages", "source": str(folder / "short")}]
    with pytest.raises(ValueError, match="cannot be mixed with others"):
        training_batches(RunConfig.of(fields), tiny_tokenizer())


def test_the_arguments_of_a_run_fit_its_configuration(tmp_path):
    config = kv_config(training={"max_minutes": 2, "torch_compile": True})
    arguments = training_arguments(config, tmp_path, CPU)
    assert (arguments.max_steps, arguments.torch_compile, arguments.use_cpu) == (8, False, True)


def test_the_directory_of_another_run_is_refused(tmp_path):
    config = kv_config()
    with (
        claimed(tmp_path / RECIPE, config.fields(), PartialState(cpu=True)),
        pytest.raises(BlockingIOError, match="Another run is in progress"),
    ):
        train(config, tmp_path, CPU)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="a run with another configuration: memory, training differ"):
        train(kv_config(memory={"num_memory_tokens": 2}, training={"seed": 3}), tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match=r"no model trained by a recipe.*`gradmem train` measures its"):
        load_model(tmp_path / "nothing")


def test_targets_must_end_where_generation_stops(folder, tmp_path):
    backbone, tokenizer = tiny(), tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    config = qa_config(folder, backbone=str(tmp_path / "backbone"))
    with pytest.raises(ValueError, match=r"end token is '<s>' \(1\).*generation stops at 2"):
        build_model(config)
    backbone.generation_config.eos_token_id = [2, 1]
    backbone.save_pretrained(tmp_path / "backbone")
    build_model(config)


def test_a_method_without_anything_to_train_is_refused(folder, tmp_path):
    fields = qa_fields(folder, {"name": "mean_pooling"})
    del fields["memory"]["lora_config"]
    with pytest.raises(ValueError, match="trainable"):
        train(RunConfig.of(fields), tmp_path, CPU)


def test_a_configuration_survives_json(folder):
    for config in (kv_config(), qa_config(folder, {"name": "truncated_text", "tokens": 0})):
        assert RunConfig.of(json.loads(json.dumps(config.fields()))) == config
