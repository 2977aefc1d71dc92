"""Training on questions about texts: batches on the device, GradMem and baselines alike, and answering."""

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.recipes import load_recipe
from gradmem_adapter.tasks.qa_batches import make_pools
from gradmem_adapter.tasks.qa_recipe import METHODS, QARecipe
from gradmem_adapter.tasks.qa_training import Answerer, load_qa, questions, train_qa
from gradmem_adapter.tasks.saved import save_model
from gradmem_adapter.training import GradMemCollator, graphed_run
from gradmem_adapter.training_runs import train

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def rows(count, length, seed=0):
    """Where is what: contexts of `length` words, two questions each, whose answers are words of the context."""
    made = []
    for i in range(count):
        words = tiny_text(length, seed=seed + i).split()
        made.append(
            {
                "context": " ".join(words),
                "queries": [f"{words[0]} Question", f"Question {words[1]} :"],
                "targets": [words[2], f"{words[3]} {words[4]}"],
                "answers": [[words[2]], [f"{words[3]} {words[4]}", "w1"]],
            }
        )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone and two sources of rows."""
    directory = tmp_path_factory.mktemp("qa")
    tiny().save_pretrained(directory / "backbone")
    tiny_tokenizer().save_pretrained(directory / "backbone")
    for name, made in (("short", rows(6, 9)), ("long", rows(4, 14, seed=50))):
        (directory / name).mkdir()
        lines = [
            {"context": row["context"], "query": query, "target": target, "answers": answers}
            for row in made
            for query, target, answers in zip(row["queries"], row["targets"], row["answers"], strict=True)
        ]
        for split in ("train", "test"):
            (directory / name / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return directory


def recipe(folder, method="gradmem", **fields):
    memory = {"num_memory_tokens": 3, "lora_config": LORA}
    if method == "gradmem":
        memory |= {"write_lr": 0.3, "meta_gradient": "finite_difference", "reconstruction_weight": 0.2,
                   "query_format": "chat"}  # fmt: skip
    defaults = {
        "backbone": str(folder / "backbone"), "method": method, "memory": memory, "steps": 6, "tokens": 64,
        "sources": [{"source": str(folder / "short"), "share": 3}, {"source": str(folder / "long")}],
        "buckets": [10, 16], "write_steps": [1, 2], "side_by_side": [1, 2], "lr": 5e-3, "warmup_steps": 1,
        "bf16": False,
    }  # fmt: skip
    return QARecipe.of(defaults | fields)


def test_targets_must_end_where_generation_stops(folder, tmp_path):
    backbone, tokenizer = tiny(), tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"end token is '<s>' \(1\).*generation stops at 2"):
        recipe(folder, backbone=str(tmp_path / "backbone")).build()
    backbone.generation_config.eos_token_id = [2, 1]
    backbone.save_pretrained(tmp_path / "backbone")
    recipe(folder, backbone=str(tmp_path / "backbone")).build()


class TestBatches:
    @pytest.fixture(scope="class")
    def pools(self):
        collator = GradMemCollator(tiny_tokenizer())
        return make_pools([(rows(6, 9), 3.0), (rows(4, 14, seed=50), 1.0)], collator, [10, 16], "cpu")

    def test_rows_are_where_they_fit(self, pools):
        assert [pool.contexts.shape for pool in pools] == [(6, 10), (4, 16)]
        assert [pool.share for pool in pools] == pytest.approx([0.75, 0.25])
        assert pools[0].count.tolist() == [2] * 6
        assert len(pools[0].queries) == 12

    def test_a_batch_is_what_the_collator_makes_of_its_rows(self, pools):
        tokenizer, data = tiny_tokenizer(), rows(6, 9)
        torch.manual_seed(0)
        batch = pools[0].sample(5, 3)
        assert batch["context_input_ids"].shape == (5, 10)
        assert batch["context_attention_mask"].sum(1).tolist() == [9] * 5
        assert batch["context_index"].tolist() == [i for i in range(5) for _ in range(3)]
        decoded = [tokenizer.decode(ids[:9]) for ids in batch["context_input_ids"]]
        by_context = {row["context"]: row for row in data}
        for place, context in enumerate(batch["context_index"].tolist()):
            row = by_context[decoded[context]]
            labels = batch["labels"][place]
            target = tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
            number = row["targets"].index(target)
            whole = batch["input_ids"][place][batch["attention_mask"][place].bool()]
            expected = f"{row['queries'][number]} {target}"
            assert tokenizer.decode(whole, skip_special_tokens=True) == expected
        assert len(set(decoded)) > 1

    def test_sources_are_drawn_by_their_share(self):
        collator = GradMemCollator(tiny_tokenizer())
        many, few = rows(8, 9), rows(2, 9, seed=90)
        (pool,) = make_pools([(many, 1.0), (few, 3.0)], collator, [10], "cpu")
        torch.manual_seed(0)
        drawn = pool.sample(4000, 1)["context_input_ids"]
        second = (drawn[:, None] == pool.contexts[8:]).all(-1).any(1)
        assert second.float().mean().item() == pytest.approx(0.75, abs=0.03)

    def test_side_by_side_has_the_own_context_somewhere_and_different_others(self, pools):
        torch.manual_seed(0)
        index = pools[0].sample(5, 4, side_by_side=3)["context_index"]
        own = torch.arange(5).repeat_interleave(4)
        assert index.shape == (20, 3)
        assert (index == own[:, None]).sum(1).tolist() == [1] * 20
        assert all(len(set(row)) == 3 for row in index.tolist())
        assert {(index == own[:, None]).int().argmax(1)[i].item() for i in range(20)} == {0, 1, 2}

    def test_contexts_that_are_too_long_are_named(self):
        with pytest.raises(ValueError, match="Row 1 of source 0 has a context of 14 tokens"):
            make_pools([([*rows(1, 9), *rows(1, 14)], 1.0)], GradMemCollator(tiny_tokenizer()), [10], "cpu")

    def test_queries_that_are_too_long_can_be_left_out(self):
        data = rows(3, 9)
        collator = GradMemCollator(tiny_tokenizer())
        (whole,) = make_pools([(data, 1.0)], collator, [10], "cpu")
        lengths = whole.masks.sum(1)
        (pool,) = make_pools([(data, 1.0)], collator, [10], "cpu", query_tokens=int(lengths.max()))
        assert pool.queries.equal(whole.queries)
        data[1]["queries"][0] += " w1" * 9
        (pool,) = make_pools([(data, 1.0)], collator, [10], "cpu", query_tokens=int(lengths.max()))
        kept = torch.tensor([True, True, False, True, True, True])
        assert pool.queries.equal(whole.queries[kept])
        assert pool.count.tolist() == [2, 1, 2]
        assert (pool.most_queries, pool.most_targets) == (2, int((whole.labels != IGNORED).sum(1).max()))

    def test_contexts_that_are_too_long_can_be_left_out(self):
        collator = GradMemCollator(tiny_tokenizer())
        (pool,) = make_pools([([*rows(3, 9), *rows(2, 14)], 1.0)], collator, [10], "cpu", drop_longer=True)
        assert pool.lengths.tolist() == [9, 9, 9]
        with pytest.raises(ValueError, match="No row has a context of at most 10 tokens"):
            make_pools([(rows(2, 14), 1.0)], collator, [10], "cpu", drop_longer=True)


@pytest.mark.parametrize("method", METHODS)
def test_training_saving_and_answering(folder, tmp_path, method):
    plan, seen = recipe(folder, method), []
    model, tokenizer = plan.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert train_qa(model, tokenizer, plan, tmp_path / "run", device="cpu", log_every=2, callback=seen.append)
    assert [progress.step for progress in seen] == [2, 4, 6]
    trained = dict(model.named_parameters())
    assert any(not torch.equal(trained[name], value) for name, value in before.items())
    assert all(torch.equal(trained[name], value) for name, value in frozen.items())
    save_model(model, tokenizer, plan, tmp_path / "model")
    loaded, tokenizer, plan = load_qa(tmp_path / "model")
    assert plan.method == method
    contexts, queries, index, references = questions(plan.sources[0].rows("test"))
    assert len(queries) == len(references) == 12
    for reads in ([[i] for i in index], [[i, (i + 1) % 6] for i in index]):
        options = {"steps": 2, "max_new_tokens": 3}
        answers = [Answerer(m, tokenizer, plan, **options).answer(contexts, queries, reads) for m in (model, loaded)]
        assert answers[0] == answers[1]
        assert len(answers[0]) == 12
        alone = Answerer(loaded, tokenizer, plan, **options)
        assert alone.answer([contexts[i] for i in reads[5]], queries[5:6], [list(range(len(reads[5])))]) == [
            answers[0][5]
        ]


def test_a_saved_adapter_opens_everywhere_and_answers_as_the_pipeline(folder, tmp_path):
    plan = recipe(folder)
    model, tokenizer = plan.build()
    save_model(model, tokenizer, plan, tmp_path / "model")
    model, tokenizer = load_checkpoint(tmp_path / "model")
    row = plan.sources[0].rows("test")[0]
    answer = Answerer(model, tokenizer, plan, steps=2, max_new_tokens=4).answer(
        [row["context"]], row["queries"][:1], [[0]]
    )
    state = model.write(torch.tensor([tokenizer(row["context"])["input_ids"]]), steps=2)
    expected = GradMemPipeline(model, tokenizer).generate(row["queries"][0], memory=state, max_new_tokens=4)
    assert answer == [expected[0].strip()]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(folder, tmp_path):
    plan = recipe(folder)
    whole, tokenizer = plan.build()
    train_qa(whole, tokenizer, plan, tmp_path / "whole", device="cpu")
    first, _ = plan.build()
    options = {"device": "cpu", "log_every": 3}
    assert not train_qa(first, tokenizer, plan, tmp_path / "parts", stop=lambda p: p.step == 3, **options)
    second, _ = plan.build()
    assert train_qa(second, tokenizer, plan, tmp_path / "parts", **options)
    for (name, value), other in zip(whole.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7, msg=name)


def test_training_learns(folder, tmp_path):
    """A few rows are learned by heart; that GradMem learns by the same loop is seen on key-value retrieval."""
    plan = recipe(folder, "full_context", steps=150, side_by_side=[1], lr=1e-2)
    plan.memory["lora_config"] = {"r": 8, "target_modules": "all-linear"}
    model, tokenizer = plan.build()
    seen = []
    train_qa(model, tokenizer, plan, tmp_path, device="cpu", log_every=30, callback=seen.append)
    first, last = (max(v["target_loss"] for v in progress.means.values()) for progress in (seen[0], seen[-1]))
    assert last < 0.8 * first


def test_the_start_from_the_context_is_trained_without_write_steps_too(folder, tmp_path):
    memory = recipe(folder).memory | {"start": "context"}
    plan, seen = recipe(folder, memory=memory, write_steps=[0, 1], side_by_side=[1], steps=8), []
    model, tokenizer = plan.build()
    gain = model.base_model.slots.gradmem_start_gain["default"]
    before = gain.detach().clone()
    train_qa(model, tokenizer, plan, tmp_path, device="cpu", log_every=8, callback=seen.append)
    assert not torch.equal(gain, before)
    scalars = {name: set(values) for name, values in seen[0].means.items()}
    assert any("K=0" in name and "last_write_loss" in values for name, values in scalars.items())
    assert any("K=1" in name and "last_write_loss" in values for name, values in scalars.items())


def test_a_run_by_the_clock_ends_in_time_and_is_as_long_in_parts(folder, tmp_path, monkeypatch):
    """A clock of one second a look: rates fall by it, parts count together, and the checkpoint says how far it came."""
    clock = itertools.count()
    monkeypatch.setattr(graphed_run.time, "perf_counter", lambda: float(next(clock)))
    plan, rates = recipe(folder, "full_context", steps=1000, minutes=1, side_by_side=[1], decay_share=0.5), []
    monkeypatch.setattr(QARecipe, "lr_at", record(QARecipe.lr_at, rates))
    options = {"device": torch.device("cpu"), "console": Console(file=io.StringIO())}
    assert train(plan, tmp_path, max_minutes=0.5, **options) is None
    first = len(rates)
    assert train(plan, tmp_path, **options) == tmp_path / "checkpoint"
    assert 0 < first < len(rates) < 60
    assert rates[1] == max(rates) == 5e-3
    assert rates[-1] < 1e-3
    assert json.loads((tmp_path / "checkpoint" / "recipe.json").read_text())["steps"] == len(rates)


def record(function, results):
    """The function, its results kept in a list."""

    def recorded(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return recorded


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minutes": 0}, "minutes"),
        ({"method": "magic"}, "method must be one of"),
        ({"sources": []}, "at least one source"),
        ({"tokens": 20}, "largest bucket"),
        ({"stepz": 3}, "stepz"),
        ({"queries": 0}, "queries"),
        ({"write_steps": [0]}, "after which memory knows nothing of the context"),
        (
            {"write_steps": [0], "method": "forward_memory", "memory": {"start": "context"}},
            "after which memory knows nothing of the context",
        ),
        ({"write_steps": [-1]}, "write_steps"),
        ({"side_by_side": [4], "contexts": 2}, "asked of up to 4 contexts"),
    ],
)
def test_recipes_that_cannot_work(folder, fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(folder, **fields)


def test_a_method_without_anything_to_train(folder, tmp_path):
    plan = recipe(folder, "mean_pooling")
    del plan.memory["lora_config"]
    model, tokenizer = plan.build()
    with pytest.raises(ValueError, match="nothing to train"):
        train_qa(model, tokenizer, plan, tmp_path, device="cpu")


def test_a_bad_row_is_named_by_its_place():
    bad = rows(1, 9)[0] | {"targets": ["", "w1"]}
    with pytest.raises(ValueError, match="Source 1: Row 2 has an empty target"):
        make_pools([(rows(2, 9), 1.0), ([*rows(2, 9), bad], 1.0)], GradMemCollator(tiny_tokenizer()), [10], "cpu")


@pytest.mark.parametrize("path", sorted(Path("examples").glob("qa_*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_ship_are_sound(path):
    plan = load_recipe(path)
    assert isinstance(plan, QARecipe)
    assert plan.memory["num_memory_tokens"] > 0
