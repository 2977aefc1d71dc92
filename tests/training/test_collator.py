"""The collator: what a batch holds, the same tokens as in inference, and every row that is refused."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, GradMemPipeline
from gradmem_adapter.ops.cross_entropy import IGNORED
from gradmem_adapter.training import GradMemCollator

ROW = {"context": "w1 w2 w3", "query": "user :", "target": "w4"}
TWO = {"context": "w5", "queries": ["w6", "w7 w8 w9"], "targets": ["w10 w11", "w12"]}


def text(tokenizer, ids, mask):
    return [tokenizer.decode(row[keep.bool()]) for row, keep in zip(ids, mask, strict=True)]


class TestBatch:
    def test_rows_with_one_query_and_with_several(self):
        tokenizer = tiny_tokenizer()
        batch = GradMemCollator(tokenizer)([ROW, TWO])
        assert text(tokenizer, batch["context_input_ids"], batch["context_attention_mask"]) == ["w1 w2 w3", "w5"]
        full = ["user : w4 </s>", "w6 w10 w11 </s>", "w7 w8 w9 w12 </s>"]
        assert text(tokenizer, batch["input_ids"], batch["attention_mask"]) == full
        assert text(tokenizer, batch["query_input_ids"], batch["query_attention_mask"]) == ["user :", "w6", "w7 w8 w9"]
        assert text(tokenizer, batch["labels"], batch["labels"] != -100) == ["w4 </s>", "w10 w11 </s>", "w12 </s>"]
        counted = batch["labels"] != -100
        assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
        assert batch["context_index"].tolist() == [0, 1, 1]
        assert batch["targets"] == [["w4"], ["w10 w11"], ["w12"]]

    def test_queries_are_padded_on_the_left_and_the_rest_on_the_right(self):
        batch = GradMemCollator(tiny_tokenizer())([ROW, TWO])
        assert batch["context_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
        assert batch["query_attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
        assert (batch["input_ids"] == 0).equal(batch["attention_mask"] == 0)
        assert batch["labels"][batch["attention_mask"] == 0].tolist() == [-100, -100]

    def test_answers_take_the_place_of_targets_as_references(self):
        tokenizer = tiny_tokenizer()
        rows = [ROW | {"answers": ["w4", "w4 w5"]}, TWO | {"answers": [["a"], ["b", "c"]]}, ROW | {"answers": None}]
        assert GradMemCollator(tokenizer)(rows)["targets"] == [["w4", "w4 w5"], ["a"], ["b", "c"], ["w4"]]
        assert GradMemCollator(tokenizer).longest_target(rows[0]) == 3  # with the end token

    def test_columns_of_the_other_form_may_be_none(self):
        rows = [ROW | {"queries": None, "targets": None}, TWO | {"query": None, "target": None}]
        assert GradMemCollator(tiny_tokenizer())(rows)["context_index"].tolist() == [0, 1, 1]

    def test_targets_end_with_the_end_token_if_there_is_one(self):
        tokenizer = tiny_tokenizer()
        row = ROW | {"target": "w4"}

        def target(collator):
            labels = collator([row])["labels"][0]
            return labels[labels != IGNORED].tolist()

        assert target(GradMemCollator(tokenizer)) == [*tokenizer("w4")["input_ids"], tokenizer.eos_token_id]
        tokenizer.eos_token = None
        assert target(GradMemCollator(tokenizer)) == tokenizer("w4")["input_ids"]

    @pytest.mark.parametrize("query_format", ["text", "Question : {query} assistant :", "chat"])
    @pytest.mark.parametrize("bos", [False, True])
    def test_inference_sees_the_same_tokens(self, query_format, bos):
        tokenizer = tiny_tokenizer(bos=bos)
        model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=2, query_format=query_format))
        pipeline = GradMemPipeline(model, tokenizer)
        batch = GradMemCollator(tokenizer, query_format=query_format)([ROW, TWO])
        ids, mask = pipeline.encode_prompts(["user :", "w6", "w7 w8 w9"])
        assert torch.equal(batch["query_input_ids"], ids)
        assert torch.equal(batch["query_attention_mask"], mask)
        ids, mask = pipeline.encode_contexts(["w1 w2 w3", "w5"])
        assert torch.equal(batch["context_input_ids"], ids)
        assert torch.equal(batch["context_attention_mask"], mask)
        first = batch["query_attention_mask"][0].bool()
        query = batch["query_input_ids"][0][first]
        assert torch.equal(batch["input_ids"][0, : len(query)], query)

    def test_a_query_can_be_chat_messages(self):
        tokenizer = tiny_tokenizer()
        chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
        batch = GradMemCollator(tokenizer)([ROW | {"query": chat}])
        shown = text(tokenizer, batch["query_input_ids"], batch["query_attention_mask"])
        assert shown == ["<s> user : w1 assistant : w2 assistant :"]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_settings_of_the_tokenizer_are_ignored_and_kept(self, side):
        tokenizer = tiny_tokenizer()
        expected = GradMemCollator(tokenizer)([ROW, TWO])
        tokenizer.padding_side = side
        tokenizer.backend_tokenizer.enable_truncation(2)
        batch = GradMemCollator(tokenizer)([ROW, TWO])
        assert tokenizer.padding_side == side
        assert all(torch.equal(batch[name], value) for name, value in expected.items() if name != "targets")


class TestErrors:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"query": "w1", "target": "w2"}, "has no context to write"),
            (ROW | {"context": None}, "has no context to write"),
            (ROW | {"context": ""}, "has no context to write"),
            (ROW | {"context": " "}, "context has no tokens"),
            ({"context": "w1", "target": "w2"}, "has no query"),
            (ROW | {"query": ""}, "empty query"),
            (ROW | {"query": " "}, "query has no tokens"),
            ({"context": "w1", "query": "w2"}, "has no target"),
            (ROW | {"target": ""}, "empty target"),
            (ROW | {"query": 5}, "query of type int"),
            (ROW | {"target": 7}, "target of type int"),
            (ROW | {"target": " "}, "target has no tokens"),
            ({"context": "w1"}, "has no query and no target"),
            ({"context": "w1", "queries": ["w2"]}, "has no targets"),
            (TWO | {"targets": ["w1"]}, "has 2 queries, 1 target and"),
            (TWO | {"queries": [], "targets": []}, "has no queries"),
            (TWO | {"queries": "w1 w2"}, "'queries' must be a list"),
            (TWO | {"targets": ["w1", ""]}, "empty target"),
            (TWO | {"answers": [["w1"]]}, "references for 1"),
            (ROW | TWO, "mixes queries and query and target and targets"),
            (ROW | {"answers": []}, "list of texts"),
            (ROW | {"answers": "w4"}, "list of texts"),
        ],
    )
    def test_an_unusable_row(self, row, message):
        with pytest.raises(ValueError, match=f"Row 1.*{message}"):
            GradMemCollator(tiny_tokenizer())([ROW, row])

    def test_a_batch_without_rows(self):
        with pytest.raises(TypeError, match="Row 0 of the batch is a str"):
            GradMemCollator(tiny_tokenizer())(["w1"])
        with pytest.raises(ValueError, match="no rows"):
            GradMemCollator(tiny_tokenizer())([])

    def test_a_row_that_is_too_long(self):
        collator = GradMemCollator(tiny_tokenizer(), max_context_length=3)
        collator([ROW])
        with pytest.raises(ValueError, match=r"Row 1 of .*'w1 w2 w3 w4'\): the context of 4 tokens is longer"):
            collator([ROW, ROW | {"context": "w1 w2 w3 w4"}])
        with pytest.raises(ValueError, match=r"Row 1 of .*\): query and target of 5 tokens is longer than the 4"):
            GradMemCollator(tiny_tokenizer(), max_query_length=4)([ROW, TWO])

    def test_a_row_of_unknown_number_is_named_by_its_context(self):
        collator, bad = GradMemCollator(tiny_tokenizer()), {"context": "w1 " * 99, "query": "w2", "target": ""}
        with pytest.raises(ValueError, match=r"Row 1 of the batch \(context '(w1 ){20}\.\.\.'\) has an empty target"):
            collator([ROW, bad])
        with pytest.raises(ValueError, match="Row 8 has an empty target"):
            collator([ROW, bad], first=7)

    def test_a_tokenizer_without_a_pad_token(self):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match=r"Set tokenizer.pad_token = tokenizer.eos_token"):
            GradMemCollator(tokenizer)

    def test_a_tokenizer_without_a_chat_template(self):
        with pytest.raises(ValueError, match="no chat template"):
            GradMemCollator(tiny_tokenizer(chat_template=None), query_format="chat")([ROW])
