"""What baselines put before a query, alone and in batches, and what they generate from it."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny, tiny_text, tiny_tokenizer, tokens

from evaluation.key_values import pairs_tokenizer, sample_pairs
from evaluation.methods import ForwardMemory, FullContext, MeanPooling, TruncatedText, prefix
from evaluation.methods.prefix import Prefix
from evaluation.methods.shared_prefix import answer_on_one, can_share
from evaluation.models import scratch_llama
from gradmem_adapter.training.cuda_graph import maskless_attention

BASELINES = {
    "full context": FullContext(),
    "no context": TruncatedText(tokens=0),
    "truncated text": TruncatedText(),
    "mean pooling": MeanPooling(),
    "forward memory": ForwardMemory(),
}
baselines = pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)


def sampled(*numbers, seed=0):
    return sample_pairs(*numbers, generator=torch.Generator().manual_seed(seed))


def built(method, backbone, **memory):
    return method.build(backbone, {"num_memory_tokens": 4, "train_backbone": True} | memory).eval()


def kv_model(method, scale=5):
    torch.manual_seed(0)
    backbone = scratch_llama(pairs_tokenizer(), layers=2, width=32, heads=4)
    for parameter in backbone.parameters():
        parameter.data.mul_(scale if parameter.dim() == 2 else 1)
    return built(method, backbone)


@baselines
def test_padding_changes_nothing(method):
    """Each context gives the same alone and unpadded as in a batch, with or without masks."""
    model, batch = kv_model(method), sampled(5, 3, 6, 2)
    with torch.no_grad():
        together = model(**batch).logits
        with maskless_attention(model):
            torch.testing.assert_close(model(**batch).logits, together, rtol=1e-4, atol=1e-5)
        for i in range(5):
            length, rows = int(batch["context_attention_mask"][i].sum()), slice(3 * i, 3 * i + 3)
            alone = model(
                input_ids=batch["input_ids"][rows],
                labels=batch["labels"][rows],
                context_input_ids=batch["context_input_ids"][i : i + 1, :length],
                context_attention_mask=batch["context_attention_mask"][i : i + 1, :length],
                context_index=torch.zeros(3, dtype=torch.long),
            ).logits
            torch.testing.assert_close(alone, together[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_context_equals_the_model_on_context_and_query(architecture):
    backbone = tiny(architecture).eval()
    context, query = tokens(1, 5, seed=1), tokens(1, 3, seed=2)
    with torch.no_grad():
        out = built(FullContext(), backbone)(
            input_ids=query, labels=query, context_input_ids=context,
            context_attention_mask=torch.ones_like(context), context_index=torch.tensor([0]),
        )  # fmt: skip
        whole = backbone(torch.cat([context, query], 1)).logits
    torch.testing.assert_close(out.logits, whole[:, 5:], rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(whole[0, 4:-1], query[0])  # the first token from the context's last
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)


def test_no_context_sees_nothing_and_truncated_text_the_first_tokens():
    backbone = tiny().eval()
    context, lengths = tokens(2, 6), torch.tensor([6, 3])
    nothing = built(TruncatedText(tokens=0), backbone).prefix(context, lengths, 1)
    assert nothing.embeddings.shape[1] == 0
    assert nothing.lengths.tolist() == [0, 0]
    some = built(TruncatedText(), backbone).prefix(context, lengths, 1)
    assert some.lengths.tolist() == [4, 3]
    assert torch.equal(some.embeddings, backbone.get_input_embeddings()(context[:, :4]))


def test_mean_pooling_takes_the_mean_of_equal_parts():
    backbone = tiny().eval()
    context, lengths = tokens(3, 9), torch.tensor([8, 9, 2])
    with torch.no_grad():
        hidden = backbone.base_model(context).last_hidden_state
        vectors, counts = built(MeanPooling(), backbone).prefix(context, lengths, 1)
    assert counts.tolist() == [4, 4, 2]
    torch.testing.assert_close(vectors[0], hidden[0, :8].unflatten(0, (4, 2)).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors[1, 0], hidden[1, :3].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors[2, :2], hidden[2, :2], rtol=1e-4, atol=1e-5)


def test_forward_memory_sees_the_context_only_through_its_memory():
    model = kv_model(BASELINES["forward memory"], scale=1)
    batch, other = (sampled(2, 2, 3, seed=seed) for seed in (0, 1))
    changed = batch | {"context_input_ids": other["context_input_ids"]}
    with torch.no_grad():
        before = model(**batch).logits
        assert not torch.equal(before, model(**changed).logits)
        prefix = model.prefix(batch["context_input_ids"], batch["context_attention_mask"].sum(1), 1)
        model.prefix = lambda *args: prefix
        torch.testing.assert_close(model(**changed).logits, before)


def test_several_passes_differ_from_one():
    model, batch = kv_model(BASELINES["forward memory"], scale=1), sampled(2, 2, 3)
    with torch.no_grad():
        lengths = batch["context_attention_mask"].sum(1)
        memories = [model.prefix(batch["context_input_ids"], lengths, k).embeddings for k in (1, 2, 3)]
    assert not torch.allclose(memories[0], memories[1], atol=1e-3)
    assert not torch.allclose(memories[1], memories[2], atol=1e-4)


def test_zero_passes_are_refused():
    batch = sampled(2, 1, 4)
    with pytest.raises(ValueError, match=r"at least 1 pass .*got 0"):
        kv_model(BASELINES["forward memory"])(**batch, write_steps=0)


def test_the_reconstruction_loss_is_the_contexts_loss_given_its_memory():
    torch.manual_seed(0)
    backbone = tiny().eval()
    plain, weighted = (
        built(ForwardMemory(), backbone, num_memory_tokens=3, reconstruction_weight=w) for w in (0.0, 0.5)
    )
    weighted.slots = plain.slots
    context = tokens(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batch = {
        "input_ids": context[:, :3], "labels": context[:, :3], "context_input_ids": context,
        "context_attention_mask": mask, "context_index": torch.tensor([0, 1]),
    }  # fmt: skip
    memory = plain.prefix(context, mask.sum(1), 1).embeddings
    tokens_in = torch.cat([memory, backbone.get_input_embeddings()(context)], 1)
    logits = backbone(inputs_embeds=tokens_in).logits[:, 2:-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), context.flatten(), reduction="none")
    expected = each[mask.flatten().bool()].mean()
    torch.testing.assert_close(weighted(**batch).loss - plain(**batch).loss, 0.5 * expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(weighted(**batch).loss, plain(**batch).loss)


@baselines
def test_generation_equals_the_choices_of_forward(method):
    """Greedy tokens, one by one, of queries of different lengths on contexts of different lengths."""
    torch.manual_seed(0)
    model = built(method, tiny().eval())
    contexts, mask = tokens(2, 7, seed=1), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    queries, counts = tokens(2, 4, seed=2), torch.tensor([[1] * 4, [0, 1, 1, 1]])
    kept = method.read(model, None, [contexts[0].tolist(), contexts[1, :5].tolist()], 1)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        new = method.generate(model, kept, [[0], [1]], queries, counts, **options)
    for i in range(2):
        ids = queries[i][counts[i].bool()][None]
        for _ in range(3):
            with torch.no_grad():
                logits = model(
                    input_ids=ids, labels=ids, context_input_ids=contexts, context_attention_mask=mask,
                    context_index=torch.tensor([i]),
                ).logits  # fmt: skip
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert new[i].tolist() == ids[0, -3:].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_long_context_is_computed_once_for_all_its_queries(attention, monkeypatch):
    backbone = tiny(max_position_embeddings=300, attn_implementation=attention)
    method, seen = FullContext(), []
    model = built(method, backbone, train_backbone=False)
    contexts = [tiny_text(length, seed=length) for length in (120, 90, 7)]
    queries = [tiny_text(3 + i, seed=i) for i in range(9)]
    reads = [[i % 3] for i in range(9)]

    def answers():
        return method.answer(
            model, tiny_tokenizer(), contexts, queries, reads,
            steps=0, query_format="{query}", max_new_tokens=6, tokens=256,
        )  # fmt: skip

    monkeypatch.setattr(prefix, "can_share", lambda backbone: False)
    apart = answers()
    monkeypatch.undo()
    backbone.model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["inputs_embeds"].shape[:2])
        if options.get("inputs_embeds") is not None else None, with_kwargs=True
    )  # fmt: skip
    assert answers() == apart
    assert len(set(apart)) > 5
    assert sorted(shape for shape in seen if shape[1] >= 90) == [(1, 90), (1, 120)]


def test_each_answer_stops_at_its_own_end_token():
    backbone, before = tiny(max_position_embeddings=300), tokens(1, 40)
    queries = [tokens(1, n, seed=n) for n in range(2, 9)]

    def generated(query):
        ids = backbone.generate(torch.cat([before, query], 1), max_new_tokens=8)
        return ids[0, 40 + query.shape[1] :].tolist()

    ends = backbone.generation_config.eos_token_id = [generated(queries[0])[0], generated(queries[2])[3]]
    expected = [[token for token in generated(query) if token not in ends] for query in queries]
    embed = backbone.get_input_embeddings()
    assert answer_on_one(backbone, embed(before)[0], [embed(query)[0] for query in queries], 8) == expected
    assert len({len(row) for row in expected}) > 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbones_with_sliding_windows_cannot_share_a_context(architecture):
    assert can_share(tiny(architecture)) == (architecture not in ("gemma3_text", "mistral"))


BYTES_PER_TOKEN = 4 * 2 * 2 * 2 * 8  # keys and values of 2 layers with 2 heads of 8, in float32


@pytest.mark.parametrize(
    ("name", "kept"),
    [("full context", 9 * BYTES_PER_TOKEN), ("truncated text", 4 * BYTES_PER_TOKEN), ("no context", 0),
     ("mean pooling", 4 * 32 * 4), ("forward memory", 4 * 32 * 4)],
)  # fmt: skip
def test_bytes_per_context(name, kept):
    assert BASELINES[name].bytes_per_context(tiny(), {"num_memory_tokens": 4}, 9) == kept


def test_prefixes_can_be_joined_side_by_side():
    embeddings, lengths = torch.arange(1.0, 7).view(3, 2, 1), torch.tensor([2, 1, 2])
    joined = Prefix(embeddings, lengths).rows(torch.tensor([[1, 0], [2, 1]]))
    assert joined.lengths.tolist() == [3, 3]
    assert joined.embeddings[0, :3, 0].tolist() == [3, 1, 2]
    assert joined.embeddings[1, :3, 0].tolist() == [5, 6, 3]
