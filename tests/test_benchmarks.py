"""The benchmarks run on a CPU in seconds, and their records say what they should; times are not checked."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tokens
from tiny_pipeline import byte_pipeline

from benchmarks import (
    bulk_write,
    choose,
    common,
    decode,
    kinks,
    kv_meta_gradient,
    meta_gradient,
    read,
    serve,
    service,
    sizes,
    textbook,
    train_step,
    training_speed,
    versus_prompting,
    write,
)
from benchmarks.shapes import DEFAULT, SHAPES
from evaluation.results import load_records
from gradmem_adapter import GradMemConfig, save_checkpoint
from gradmem_adapter.meta_gradients import STRATEGIES
from gradmem_adapter.write import fast
from gradmem_adapter.write.loss import write_pass

KV_BYTES_PER_TOKEN = 2 * 2 * 3 * 64 * 4  # keys and values of 2 layers with 3 heads of 64, in float32


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a benchmark on a small model and returns the records that it appended to its file."""
    monkeypatch.setitem(common.SMOLLM2_135M, "vocab_size", 300)
    monkeypatch.setattr(common, "gc", SimpleNamespace(collect=lambda: 0))  # takes longer than what is measured here

    def run(benchmark, task, *options):
        small = ["--device", "cpu", "--dtype", "float32", "--layers", "2", "--repeats", "1", "--results", str(tmp_path)]
        benchmark.main([*options, *small])
        records = load_records(tmp_path / f"{task}.jsonl")
        assert not any("error" in record.facts for record in records)
        assert all(record.task == task and record.settings["hardware"] for record in records)
        assert all(record.metrics.get("milliseconds", 1) > 0 for record in records)
        return records

    return run


def settings(records, *names):
    return [tuple(record.settings[name] for name in names) for record in records]


def test_decode(run):
    options = ("--batch", "2", "3", "--query", "4", "--memory", "3", "--tokens", "5")
    records = run(decode, "decode", *options)
    ways = ["default", "static, step by step", "static"]
    assert [record.method for record in records] == ways * 2
    assert settings(records, "batch", "new_tokens") == [(2, 5)] * 3 + [(3, 5)] * 3
    assert all((record.metrics["same_tokens"], record.metrics["same_until"]) == (1, 5) for record in records)


def test_decode_reports_where_tokens_start_to_differ():
    def generate(prompts, max_new_tokens, cache_implementation=None, **_):
        new = torch.zeros(2, max_new_tokens, dtype=torch.long)
        if cache_implementation is None:
            new[1, 3:4] = 7
        return torch.cat([prompts, new], dim=1)

    model = SimpleNamespace(write=lambda *_, **__: None, generate=generate)
    args = SimpleNamespace(one_state=False, device="cpu", repeats=1, tokens=5)
    other, same = (decode.measure(model, tokens(2, 4), way, args) for way in ("default", decode.REFERENCE))
    assert (other["same_tokens"], other["same_until"]) == (pytest.approx(0.9), 3)
    assert (same["same_tokens"], same["same_until"]) == (1, 5)


def test_read(run):
    records = run(read, "read", "--queries", "4", "6", "--batches", "2", "--memory", "3", "--new-tokens", "2")
    assert [record.method for record in records] == [*read.WAYS, *read.WAYS]
    assert settings(records, "query_tokens", "batch") == [(4, 2)] * 3 + [(6, 2)] * 3
    assert all(record.metrics["first_token_ms"] > 0 < record.metrics["tokens_per_second"] for record in records)
    kept = 2 * (3 * KV_BYTES_PER_TOKEN + 3 * 576 * 4)  # two states' keys, values and vectors
    assert [record.metrics["kept_mib"] for record in records] == [0, 0, kept / 2**20] * 2


def test_choose(run, tmp_path):
    for split, word in (("test", "heron"), ("train", "frog")):
        lines = [
            {"context": f"{word}{i} lives in a lake", "query": f"What is {word}{i}?", "target": "lake"}
            for i in range(9)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (few, more) = run(choose, "choose", str(tmp_path), "--states", "4", "12", "--k", "1", "2")
    assert settings([few, more], "states", "questions") == [(4, 4), (12, 9)]
    assert few.metrics["right_of_1"] == more.metrics["right_of_2"] == 1


def test_bulk_write(run):
    (record,) = run(bulk_write, "bulk_write", "--texts", "4", "--words", "20", "20", "--segment-tokens", "10")
    assert settings([record], "processes", "texts") == [(1, 4)]
    documents, segments, tokens = (record.metrics[f"{name}_per_second"] for name in ("documents", "segments", "tokens"))
    assert (segments / documents, tokens / documents) == pytest.approx((2, 20))


def test_kinks(run):
    records = run(kinks, "meta_gradient_kinks", "--backbones", "llama", "opt", "--scales", "4", "--seeds", "1")
    assert [record.method for record in records] == [*kinks.WAYS, *kinks.WAYS]
    smooth, rough = ({r.method: r.metrics["cosine_lowest"] for r in part} for part in (records[:4], records[4:]))
    assert smooth["finite difference"] > 0.999 > 0.9 > smooth["first order"]
    assert rough["finite difference"] < 0.5 < rough["first order"]


def test_measurements_are_kept_when_a_benchmark_is_stopped(run, tmp_path, monkeypatch):
    def measure(model, backbone, way, *_):
        if way == "memory":
            raise KeyboardInterrupt
        return {"first_token_ms": 1.0}

    monkeypatch.setattr(read, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(read, "read")
    assert [record.method for record in load_records(tmp_path / "read.jsonl")] == ["plain"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, monkeypatch):
    monkeypatch.setitem(SHAPES[shape], "vocab_size", 300)
    small = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, value in small.items():
        monkeypatch.setitem(SHAPES[shape], name, value)
    options = ["--device", "cpu", "--dtype", "bfloat16", "--layers", "1", "--shape", shape]
    args = common.parser("", "").parse_args(options)
    backbone = common.backbone(args)
    assert (backbone.dtype, backbone.config.model_type) == (torch.bfloat16, SHAPES[shape]["model_type"])
    assert backbone.config.max_position_embeddings == SHAPES[shape]["max_position_embeddings"] >= 8192
    assert common.environment(args).get("shape") == (None if shape == DEFAULT else shape)


def test_sizes(run, monkeypatch):
    monkeypatch.setattr(common, "matmul_tflops", lambda *device: 1.0)
    options = ["--writes", "2x64", "2x64:0.013", "--memory", "3", "--no-compile"]
    free, bounded = run(sizes, "write_sizes", *options)
    assert (free.metrics["rows"], free.metrics["recomputed"]) == (2, 0)
    assert (bounded.metrics["recomputed"], bounded.settings["batch"]) == (1, 2)
    assert bounded.metrics["foretold_gib"] <= 0.013 == bounded.settings["max_memory_gib"] < free.metrics["foretold_gib"]


def test_every_size_that_runs_out_of_memory_is_recorded(run, monkeypatch):
    """Although only the first gives a warning."""

    def full(writer, memory, *rest):
        if len(memory) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return write_pass(writer, memory, *rest)

    monkeypatch.setattr(common, "matmul_tflops", lambda *device: 1.0)
    monkeypatch.setattr(fast, "write_pass", full)
    options = ["--writes", "2x64", "2x32", "--memory", "3", "--no-compile"]
    with pytest.warns(RuntimeWarning, match="Out of memory"):
        records = run(sizes, "write_sizes", *options)
    assert [record.metrics["out_of_memory"] for record in records] == [True, True]


def test_versus_prompting(run):
    options = [
        "--lengths",
        "64",
        "128",
        "--batches",
        "1",
        "2",
        "--memory",
        "3",
        "--write-steps",
        "1",
        "--new-tokens",
        "2",
    ]
    records = run(versus_prompting, "versus_prompting", *options)
    answers = [record for record in records if record.method == "answer"]
    assert settings(answers, "context_tokens") == [(64,), (128,)]
    for record in answers:
        assert record.metrics["context_kv_bytes"] == record.settings["context_tokens"] * KV_BYTES_PER_TOKEN
        assert record.metrics["memory_kv_bytes"] == 3 * KV_BYTES_PER_TOKEN
        assert 3 * 576 * 4 < record.metrics["state_bytes"] < 3 * 576 * 4 + 1000
        times = [value for name, value in record.metrics.items() if name.endswith("_ms")]
        assert record.metrics["context_kv_per_gib"] == 2**30 // record.metrics["context_kv_bytes"]
        assert {"states_per_gib", "memory_kv_per_gib", "write_peak_gib"} <= record.metrics.keys()
        assert len(times) == 6
        assert min(times) > 0
    decoded = [record for record in records if record.method != "answer"]
    assert [record.method for record in decoded] == ["memory", "memory", *["prompt"] * 4]
    assert settings(decoded, "context_tokens", "batch") == [(n, b) for n in (64, 64, 128) for b in (1, 2)]
    assert all(record.metrics["tokens_per_second"] > 0 for record in decoded)


class SmallestKeys:
    """Called like kvpress.KnormPress: keeps a share of each layer's cache while a context is read."""

    def __init__(self, compression_ratio):
        self.kept = 1 - compression_ratio

    @contextmanager
    def __call__(self, model):
        def keep(attention, args, kwargs, output):
            assert len(kwargs["cache_position"]) == kwargs["hidden_states"].shape[1]
            layer = kwargs["past_key_values"].layers[attention.layer_idx]
            tokens = int(self.kept * layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]

        hooks = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


def test_versus_a_compressed_cache_of_as_many_bytes(run, monkeypatch):
    """kvpress itself is not installed where tests run."""
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(KnormPress=SmallestKeys))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.5")
    options = ["--kvpress", "--lengths", "64", "--kinds", "answer", "--memory", "5", "--write-steps", "1"]
    (record,) = run(versus_prompting, "versus_prompting", *options)
    assert record.settings["kvpress"] == "0.5.5"
    assert record.metrics["press_bytes"] == record.metrics["state_bytes"] // KV_BYTES_PER_TOKEN * KV_BYTES_PER_TOKEN
    assert {"press_ms", "first_token_press_ms", "press_per_gib"} <= record.metrics.keys()


def test_batches_grow_until_memory_runs_out(tmp_path, monkeypatch):
    def decode(model, backbone, way, length, batch, args):
        if batch > 2:
            raise MemoryError
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(versus_prompting, "decode", decode)
    monkeypatch.setattr(versus_prompting, "answer", lambda *_: {})
    versus_prompting.main(["--device", "cpu", "--layers", "1", "--lengths", "8", "--batches", "1", "2", "4", "8",
                           "--results", str(tmp_path)])  # fmt: skip
    records = [r for r in load_records(tmp_path / "versus_prompting.jsonl") if r.method == "prompt"]
    found = [(record.settings["batch"], record.facts.get("error")) for record in records]
    assert found == [(1, None), (2, None), (4, "out of memory")]


def test_a_reopened_cache_leaves_the_first_unchanged():
    backbone = tiny()
    _, cache = versus_prompting.prefill(backbone, tokens(1, 5))
    token, grown = versus_prompting.prefill(backbone, tokens(1, 3, seed=1), versus_prompting.reopened(cache))
    assert (cache.get_seq_length(), grown.get_seq_length()) == (5, 8)
    whole = torch.cat([tokens(1, 5), tokens(1, 3, seed=1)], dim=1)
    assert torch.equal(token, backbone(whole).logits[:, -1:].argmax(-1))


def test_contexts_leave_room_for_question_and_answer():
    assert common.fitting([256, 8192, 4096], 8144) == [256, 8144, 4096]
    assert common.fitting([8192, 8160, 64], 8144) == [8144, 64]


def test_break_even():
    assert versus_prompting.break_even(600, 20) == 30
    assert versus_prompting.break_even(-5, 20) == 0
    assert versus_prompting.break_even(600, -1) is None


def test_growth_stops_at_the_models_last_position(run, monkeypatch):
    monkeypatch.setattr(write, "cost", lambda *shape: {})
    monkeypatch.setattr(common, "matmul_tflops", lambda *device: 1.0)
    records = run(write, "write_growth", "growth", "--lengths", "64", "8192", "--steps", "1", "2", "--memory", "8")
    assert [(r.settings["length"], r.write_steps) for r in records] == [(64, 1), (8184, 1), (64, 2)]


def test_write(run):
    options = ["--batch", "2", "--lengths", "16", "--steps", "1", "--memory", "3"]
    compared = run(write, "write_compare", *options, "--methods", "textbook", "plain")
    assert [record.method for record in compared] == ["textbook", "plain"]
    assert all(record.metrics["share_of_matmul"] > 0 for record in compared)


def test_write_many(run):
    ways = ["one by one, plain", "write_many, auto"]
    records = run(write, "write_many", "many", "--contexts", "2", "--steps", "1", "--memory", "3", "--ways", *ways)
    assert [record.method for record in records] == ways


def test_train_step(run):
    records = run(
        train_step, "train_step", "--length", "8", "--query", "4", "--batches", "1", "2", "--steps", "1",
        "--many-steps", "2", "--how", "eager", "--strategies", "finite_difference",
    )  # fmt: skip
    assert [record.method for record in records] == ["textbook", *["finite_difference, eager"] * 2]
    assert [(r.settings["batch"], r.write_steps) for r in records] == [(1, 1), (1, 1), (2, 2)]
    (record,) = run(
        train_step, "train_step_lora", "--length", "8", "--query", "4", "--batches", "1", "2", "--steps",
        "--many-steps", "1", "--how", "eager", "--lora", "2", "--checkpointing", "2", "--micro-batch", "1",
        "--warm-up", "0",
    )  # fmt: skip
    assert [record.settings[name] for name in ("lora", "checkpointing", "micro_batch")] == [2, 2, 1]


def test_training_speed(run):
    records = run(
        training_speed, "training_speed", "--works", "kv", "--how", "plain", "graphs", "--steps", "1", "--pairs", "3",
        "--contexts", "2", "--queries", "2",
    )  # fmt: skip
    assert [record.method for record in records] == ["Trainer as it is", "Trainer, CUDA graphs"]
    assert settings(records, "what") == [("key-value retrieval, 3 pairs, K=1, 2 contexts",)] * 2
    assert all(record.metrics["steps_per_second"] > 0 for record in records)


def test_batches_of_texts_have_about_8192_tokens():
    args = common.parser("", "").parse_args([])
    batch = training_speed.Texts(args).batch(0, torch.device("cpu"))
    assert batch["context_input_ids"].shape == (36, 224)
    assert (batch["labels"] >= 0).sum(1).tolist() == [12] * 72


def byte_adapter(path, trained_length=None):
    """A directory with an adapter on a model of bytes."""
    pipeline = byte_pipeline()
    pipeline.model.get_base_model().save_pretrained(path / "backbone")
    pipeline.tokenizer.save_pretrained(path / "backbone")
    config = pipeline.model.active_peft_config
    config.base_model_name_or_path, config.trained_length = str(path / "backbone"), trained_length
    save_checkpoint(pipeline.model, pipeline.tokenizer, path / "adapter")
    return str(path / "adapter")


def test_service(run, tmp_path):
    """Concurrent calls over a few documents: none is written twice, none fails, and cancelled ones block nobody."""
    options = [byte_adapter(tmp_path), "--requests", "11", "--rounds", "2", "--max-batch", "1", "4"]
    records = run(service, "service", *options)
    assert settings(records, "max_batch", "documents") == [(1, 10), (4, 10)]
    assert [(record.metrics["writes"], record.metrics["errors"]) for record in records] == [(10, 0)] * 2


@pytest.mark.slow
def test_serve(run, tmp_path):
    """No answer is wrong, lost or another tenant's, whatever clients do, and after a kill."""
    options = [byte_adapter(tmp_path, trained_length=100), "--clients", "4", "--seconds", "3", "--stress", "15"]
    asking, stress = run(serve, "serve", *options)
    assert asking.metrics["errors"] == asking.metrics["wrong"] == 0 < asking.metrics["requests_per_second"]
    assert stress.metrics["requests"] > 50
    assert [stress.metrics[name] for name in ("errors", "wrong", "crossed", "lost")] == [0] * 4


def test_a_bias_is_distinguished_from_noise():
    torch.manual_seed(0)
    noise = torch.randn(400, 50)
    assert kv_meta_gradient.length_of_mean(list(noise)) < 0.25  # the length of a single one is 7, of their mean 0.35
    assert kv_meta_gradient.length_of_mean(list(noise + 0.2)) == pytest.approx(0.2 * 50**0.5, abs=0.1)


def test_kv_meta_gradient(run):
    options = ["--pairs", "4", "--write-steps", "1", "--contexts", "2", "--batches", "2"]
    records = run(kv_meta_gradient, "kv_meta_gradient", *options)
    assert [record.settings.get("relative_step") for record in records] == [None, 0.03, 0.01]
    assert records[-1].metrics["cosine"] > 0.99


def test_meta_gradient(run, tmp_path, monkeypatch):
    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [3 + ord(letter) % 50 for letter in text]}

    monkeypatch.setattr(meta_gradient, "load_backbone", lambda *_, **__: (tiny(), Tokenizer()))
    monkeypatch.setitem(STRATEGIES, "a_new_one", STRATEGIES["first_order"])
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 3)
    records = run(
        meta_gradient, "meta_gradient_accuracy", "--text", str(tmp_path / "text.txt"), "--batch", "2", "--length", "12",
        "--query", "4", "--memory", "3", "--lrs", "0.1", "--steps-to-try", "0.002",
    )  # fmt: skip
    cosines = {record.method: record.metrics["cosine"] for record in records[1:]}
    assert cosines["exact float32 by the textbook"] > 0.99999
    assert cosines["finite difference float32"] > 0.999
    assert cosines["a new one float32"] == pytest.approx(cosines["first order float32"])


@pytest.mark.parametrize("second_order_steps", [None, 0])
def test_the_textbook_gives_the_same_states(second_order_steps):
    backbone = tiny(attn_implementation="eager").requires_grad_(False)
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3, memory_init_std=0.5))
    slots = model.base_model.slots.gradmem_memory["default"].detach()
    expected = model.write(tokens(2, 9), steps=3, lr=0.3).vectors
    memory = textbook.write(model.get_base_model(), slots, tokens(2, 9), 3, 0.3, second_order_steps).detach()
    torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-5)
