"""Ready batches: what is drawn, by whom, and of which shapes; training on them learns and can be resumed."""

import pytest
import torch
from test_trainer import LORA, gradients, logs, make, same, trainer, weights
from tiny import rows, tiny_tokenizer

from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.training import Batches, GradMemCollator, RowBatches
from gradmem_adapter.training.pools import load_pools, make_pools, save_pools

CPU = torch.device("cpu")
COLLATOR = GradMemCollator(tiny_tokenizer())


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first
    )


@pytest.fixture(scope="module")
def pools():
    return make_pools([(rows(6, 9), 3.0), (rows(4, 14, seed=50), 1.0)], COLLATOR, [10, 16])


class TestPools:
    def test_rows_go_into_the_bucket_that_fits(self, pools):
        assert [pool.contexts.shape for pool in pools] == [(6, 10), (4, 16)]
        assert [pool.share for pool in pools] == pytest.approx([0.75, 0.25])
        assert pools[0].count.tolist() == [2] * 6
        assert len(pools[0].queries) == 12

    def test_buckets_follow_the_lengths_by_default(self):
        lengths = [
            pool.length for pool in make_pools([([*rows(2, 9), *rows(2, 65), *rows(1, 128)], 1.0)], COLLATOR, None)
        ]
        assert lengths == [64, 128]

    def test_a_batch_equals_what_the_collator_makes_of_its_rows(self, pools):
        tokenizer, data = tiny_tokenizer(), rows(6, 9)
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
        (pool,) = make_pools([(rows(8, 9), 1.0), (rows(2, 9, seed=90), 3.0)], COLLATOR, [10])
        drawn = pool.sample(4000, 1)["context_input_ids"]
        second = (drawn[:, None] == pool.contexts[8:]).all(-1).any(1)
        assert second.float().mean().item() == pytest.approx(0.75, abs=0.03)

    @pytest.mark.parametrize("wanted", [2, 3, 5])
    def test_no_query_is_repeated_while_others_are_left(self, wanted):
        texts = [row["context"] for row in rows(6, 9)]
        data = [
            {"context": text, "queries": [f"w{i}" for i in range(count)], "targets": ["w1"] * count}
            for text, count in zip(texts, (1, 2, 3, 4, 5, 6), strict=True)
        ]
        (pool,) = make_pools([(data, 1.0)], COLLATOR, [10])
        batch = pool.sample(50, wanted)
        for context, drawn in zip(batch["context_input_ids"], batch["input_ids"].view(50, wanted, -1), strict=True):
            number = (pool.contexts == context).all(1).int().argmax().item()
            assert len({tuple(row.tolist()) for row in drawn}) == min(wanted, pool.count[number])

    def test_side_by_side_mixes_the_own_context_with_different_others(self, pools):
        index = pools[0].sample(5, 4, side_by_side=3)["context_index"]
        own = torch.arange(5).repeat_interleave(4)
        assert index.shape == (20, 3)
        assert (index == own[:, None]).sum(1).tolist() == [1] * 20
        assert all(len(set(row)) == 3 for row in index.tolist())
        assert {(index == own[:, None]).int().argmax(1)[i].item() for i in range(20)} == {0, 1, 2}

    def test_the_parts_of_a_context_keep_their_order_among_others(self, pools):
        batch = pools[0].sample(5, 4, side_by_side=5, parts=3)
        assert batch["context_input_ids"].shape == (15, 4)  # 10 places in three parts
        assert batch["context_attention_mask"].sum(1).tolist() == [3] * 15  # of 9 tokens
        parts = batch["context_input_ids"][:, :3].reshape(5, 9)
        assert torch.equal(parts, batch["text_input_ids"][:, :9])
        assert batch["text_attention_mask"].sum(1).tolist() == [9] * 5
        index, own = batch["context_index"], batch["text_index"][:, None]
        assert index.shape == (20, 5)
        assert all(len(set(row)) == 5 for row in index.tolist())
        for row, text in zip(index.tolist(), own[:, 0].tolist(), strict=True):
            assert [state for state in row if state // 3 == text] == [3 * text, 3 * text + 1, 3 * text + 2]

    def test_a_context_with_fewer_tokens_than_parts_has_no_empty_part(self):
        row = {"context": "w1 w2", "query": "w3", "target": "w4"}
        (pool,) = make_pools([([row, row], 1.0)], COLLATOR, [10])
        assert pool.sample(2, 1, 3, 3)["context_attention_mask"].sum(1).tolist() == [1] * 6

    def test_contexts_that_are_too_long_are_named(self):
        with pytest.raises(ValueError, match="Row 1 of source 0 has a context of 14 tokens"):
            make_pools([([*rows(1, 9), *rows(1, 14)], 1.0)], COLLATOR, [10])

    def test_a_bad_row_is_named_by_its_source_and_number(self):
        with pytest.raises(ValueError, match="Source 1: Row 2 has no context"):
            make_pools([(rows(1, 9), 1.0), ([*rows(2, 9), {"query": "a", "target": "b"}], 1.0)], COLLATOR, [10])

    def test_queries_that_are_too_long_can_be_left_out(self):
        data = rows(3, 9)
        (whole,) = make_pools([(data, 1.0)], COLLATOR, [10])
        longest = int(whole.masks.sum(1).max())
        (pool,) = make_pools([(data, 1.0)], COLLATOR, [10], query_tokens=longest)
        assert pool.queries.equal(whole.queries)
        data[1]["queries"][0] += " w1" * 9
        (pool,) = make_pools([(data, 1.0)], COLLATOR, [10], query_tokens=longest)
        kept = torch.tensor([True, True, False, True, True, True])
        assert pool.queries.equal(whole.queries[kept])
        assert pool.count.tolist() == [2, 1, 2]
        assert (pool.most_queries, pool.most_targets) == (2, int((whole.labels != IGNORED).sum(1).max()))

    def test_contexts_that_are_too_long_can_be_left_out(self):
        (pool,) = make_pools([([*rows(3, 9), *rows(2, 14)], 1.0)], COLLATOR, [10], drop_longer=True)
        assert pool.lengths.tolist() == [9, 9, 9]
        with pytest.raises(ValueError, match="all contexts are longer than 10 tokens"):
            make_pools([(rows(2, 14), 1.0)], COLLATOR, [10], drop_longer=True)


class TestRowBatches:
    def make(self, **options):
        defaults = {"buckets": [10, 16], "tokens": 64, "queries": 3, "side_by_side": [1, 2], "write_steps": [0, 1, 2]}
        return RowBatches([(rows(6, 9), 3.0), (rows(4, 14, 50), 1.0)], COLLATOR, **defaults | options)

    def test_a_batch_is_drawn_by_its_number_and_the_seed(self):
        first, second, other = self.make(), self.make(), self.make(seed=1)
        second.batch(0, CPU)
        assert all(equal(first.batch(n, CPU), second.batch(n, CPU)) for n in (5, 3, 5))
        assert not all(equal(first.batch(n, CPU), other.batch(n, CPU)) for n in range(4))

    def test_processes_draw_different_rows_of_the_same_kind(self, monkeypatch):
        for n in range(8):
            one = self.make().batch(n, CPU)
            with monkeypatch.context() as patch:
                patch.setattr(Batches, "process", 1)
                two = self.make().batch(n, CPU)
            assert one["write_steps"] == two["write_steps"]
            assert {name: torch.as_tensor(one[name]).shape for name in one} == {
                name: torch.as_tensor(two[name]).shape for name in two
            }
            assert not torch.equal(one["context_input_ids"], two["context_input_ids"])

    def test_pools_can_be_saved_and_loaded(self, tmp_path):
        made = self.make()
        save_pools(made.pools, tmp_path / "pools")
        kept = RowBatches(load_pools(tmp_path / "pools"), COLLATOR, tokens=64, queries=3, side_by_side=[1, 2],
                          write_steps=[0, 1, 2])  # fmt: skip
        assert len(kept) == len(made)
        assert all(equal(kept.batch(n, CPU), made.batch(n, CPU)) for n in range(6))

    def test_batches_come_in_all_requested_kinds(self):
        drawn = [self.make().batch(n, CPU) for n in range(60)]
        assert {batch["write_steps"] for batch in drawn} == {0, 1, 2}
        assert {batch["context_input_ids"].shape for batch in drawn} == {(6, 10), (4, 16)}  # 64 tokens of each
        assert {batch["context_index"].dim() for batch in drawn} == {1, 2}
        read = {(batch["context_index"].dim(), len(batch["input_ids"])) for batch in drawn}
        assert read == {
            (1, 12),
            (1, 8),
            (2, 6),
            (2, 4),
        }  # two queries of each context, not three; one where two are read
        assert {batch["max_targets"] for batch in drawn} == {3}  # two words and the end token

    def test_write_steps_can_be_set_separately_for_several_states(self):
        made = self.make(side_by_side=[1, [2, 2]], write_steps_side_by_side=[5])
        drawn = [made.batch(n, CPU) for n in range(60)]
        assert {(batch["context_index"].dim(), batch["write_steps"]) for batch in drawn} == {
            (1, 0), (1, 1), (1, 2), (2, 5),
        }  # fmt: skip
        assert all(("text_input_ids" in batch) == (batch["write_steps"] == 5) for batch in drawn)

    def test_the_length_is_the_number_of_batches(self):
        assert len(RowBatches(rows(9, 9), COLLATOR, contexts=4)) == 3
        assert len(self.make(steps=7)) == 7
        with pytest.raises(TypeError, match="Batches has no length"):
            len(Batches())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"side_by_side": [4], "contexts": 3}, "must hold the 4 contexts"),
            ({"side_by_side": [1, 5]}, "must hold the 5 contexts of 16 tokens"),
            ({"buckets": [10]}, "larger bucket"),
        ],
    )
    def test_batches_that_cannot_be_drawn_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.make(**options)
        with pytest.raises(ValueError, match="no rows"):
            RowBatches([], COLLATOR)
        for wrong in (
            {"write_steps": 1}, {"write_steps": []}, {"write_steps_side_by_side": [-1]}, {"side_by_side": []},
            {"side_by_side": [0]}, {"side_by_side": [[2, 3]]}, {"side_by_side": [[2, 1, 1]]},
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a non-empty list of"):
                RowBatches(rows(2, 9), COLLATOR, **wrong)


class Stages(Batches):
    """One row at first, then others at a tenth of the rate: a curriculum that depends on the step."""

    def batch(self, step, device):
        batch = COLLATOR(rows(1, 5) if step < 2 else rows(2, 9, seed=step))
        ready = {name: batch[name] for name in batch if not name.startswith("query_") and name != "targets"}
        return ready | {"write_steps": 1 if step < 2 else 3}

    def lr_factor(self, step):
        return 1.0 if step < 2 else 0.1


class TestTraining:
    def test_a_curriculum_changes_write_steps_and_learning_rate(self, tmp_path):
        run = trainer(make(), tmp_path, Stages(), max_steps=4, lr_scheduler_type="constant", learning_rate=0.1)
        run.train()
        assert logs(run, "write_steps") == [1, 1, 3, 3]
        assert logs(run, "learning_rate") == pytest.approx([0.1, 0.1, 0.01, 0.01])

    def test_a_custom_batch_trains_on_the_models_loss(self, tmp_path):
        found, run = gradients(make(lora_config=LORA), tmp_path, Stages())
        model = make(lora_config=LORA)
        loss = model(**Stages().batch(0, CPU)).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert logs(run, "loss")[0] == pytest.approx(loss.item(), rel=1e-5)

    @pytest.mark.parametrize("cuda_graphs", [False, True])
    def test_training_on_ready_batches_learns(self, tmp_path, cuda_graphs):
        model = make(train_backbone=True, meta_gradient="first_order")
        run = trainer(
            model, tmp_path, rows(4, 9), rows(4, 9), max_steps=60, per_device_train_batch_size=4, learning_rate=3e-3,
            cuda_graphs=cuda_graphs, write_steps=[1, 2],
        )  # fmt: skip
        run.train()
        assert logs(run, "loss")[-1] < 0.5 * logs(run, "loss")[0]
        assert run.evaluate()["eval_exact_match"] > 0.5
        assert bool(logs(run, "exact_match")) is cuda_graphs

    @pytest.mark.parametrize("cuda_graphs", [False, True])
    def test_a_resumed_run_draws_the_same_batches(self, tmp_path, cuda_graphs):
        def run(path, **options):
            data = RowBatches(rows(7, 9), COLLATOR, contexts=3, side_by_side=[1, 2])
            return trainer(
                make(lora_config=LORA, learn_write_lr="scalar"), path, data, max_steps=6, save_strategy="steps",
                save_steps=2, gradient_accumulation_steps=2, write_steps=[1, 2], cuda_graphs=cuda_graphs, **options,
            )  # fmt: skip

        whole = run(tmp_path / "whole")
        whole.train()
        resumed = run(tmp_path / "resumed")
        resumed.args.output_dir = str(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert same(weights(resumed.model), weights(whole.model))
        assert logs(resumed, "loss") == logs(whole, "loss")

    def test_an_epoch_draws_each_context_about_once(self, tmp_path):
        run = trainer(
            make(), tmp_path, rows(9, 9), max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4,
            cuda_graphs=True,
        )  # fmt: skip
        run.train()
        assert run.state.global_step == 6

    def test_evaluation_needs_rows_of_texts(self, tmp_path):
        for dataset in (Stages(), {"some": rows(2, 9), "ready": Stages()}):
            with pytest.raises(TypeError, match="rows of texts, not Batches"):
                trainer(make(), tmp_path, rows(2, 9), dataset)
