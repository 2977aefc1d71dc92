"""The benchmarks run on a CPU in seconds, and their rows say what they should; no time is looked at."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny, tokens

from benchmarks import common, kv_meta_gradient, read, textbook, train_step, versus_prompting, write
from gradmem_adapter import GradMemConfig

TINY = ["--device", "cpu", "--dtype", "float32", "--layers", "2", "--repeats", "1", "--new-tokens", "2"]
KV_BYTES_PER_TOKEN = 2 * 2 * 3 * 64 * 4  # keys and values of 2 layers with 3 heads of 64, in float32


def number(row, column):
    return float(row[column])


def test_read(tmp_path, capsys):
    path = tmp_path / "read.csv"
    read.main([*TINY, "--queries", "4", "6", "--batches", "2", "--memory", "3", "--output", str(path)])
    rows = common.read(path)
    assert [(row["way"], row["query_tokens"]) for row in rows] == [(way, n) for n in "46" for way in read.WAYS]
    for row in rows:
        assert not row.get("error")
        assert number(row, "first_token_ms") > 0
        assert number(row, "tokens_per_second") > 0
    kept = 2 * (3 * KV_BYTES_PER_TOKEN + 3 * 576 * 4)  # two states' keys, values and vectors
    expected = [0, 0, kept / 2**20] * 2
    assert [number(row, "kept_mib") for row in rows] == pytest.approx(expected, rel=1e-3)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_read_keeps_what_was_measured_when_it_is_stopped(tmp_path, monkeypatch):
    def measure(model, way, *_):
        if way == "memory":
            raise KeyboardInterrupt
        return {"first_token_ms": 1.0}

    monkeypatch.setattr(read, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        read.main([*TINY, "--output", str(tmp_path / "read.csv")])
    assert [row["way"] for row in common.read(tmp_path / "read.csv")] == ["plain"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The CSV file of a run."""
    path = tmp_path_factory.mktemp("versus_prompting") / "rows.csv"
    options = ["--lengths", "64", "128", "--max-batch", "2", "--memory", "3", "--write-steps", "1"]
    versus_prompting.main([*TINY, *options, "--output", str(path)])
    return path


def test_versus_prompting(compared):
    rows = common.read(compared)
    assert not any(row.get("error") for row in rows)
    answers = [row for row in rows if row["kind"] == "answer"]
    assert [row["context_tokens"] for row in answers] == ["64", "128"]
    for row in answers:
        context, memory = (number(row, f"{name}_kv_bytes") for name in ("context", "memory"))
        assert context == int(row["context_tokens"]) * KV_BYTES_PER_TOKEN
        assert memory == 3 * KV_BYTES_PER_TOKEN
        assert 3 * 576 * 4 < number(row, "state_bytes") < 3 * 576 * 4 + 1000
        assert number(row, "context_kv_per_gib") == 2**30 // context
        times = [number(row, column) for column in row if column.endswith("_ms")]
        assert len(times) == 6
        assert min(times) > 0
        assert row["break_even_kept"].endswith("times fewer")
    decoded = [(row["way"], row["context_tokens"], row["batch"]) for row in rows if row["kind"] == "decode"]
    ways = (("memory", "64"), ("prompt", "64"), ("prompt", "128"))
    assert decoded == [(*way, batch) for way in ways for batch in "12"]
    assert all(number(row, "tokens_per_second") > 0 for row in rows if row["kind"] == "decode")


def test_plot_from_the_file_alone(compared, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    versus_prompting.main(["--lengths", "--output", str(compared), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_batches_grow_until_there_is_no_memory(monkeypatch):
    def decode(backbone, cache, batch, args):
        if batch > 2:
            raise MemoryError
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(versus_prompting, "decode", decode)
    model = versus_prompting.get_peft_model(tiny(), versus_prompting.GradMemConfig(num_memory_tokens=2))
    args = versus_prompting.argparse.Namespace(question=4, max_batch=64)
    rows = list(versus_prompting.decodes(model, "prompt", 8, args))
    assert [(row["batch"], row.get("error")) for row in rows] == [(1, None), (2, None), (4, "out of memory")]


def test_a_reopened_cache_leaves_the_first_alone():
    backbone = tiny()
    _, cache = versus_prompting.prefill(backbone, tokens(1, 5))
    token, grown = versus_prompting.prefill(backbone, tokens(1, 3, seed=1), versus_prompting.reopened(cache))
    assert (cache.get_seq_length(), grown.get_seq_length()) == (5, 8)
    whole = torch.cat([tokens(1, 5), tokens(1, 3, seed=1)], dim=1)
    assert torch.equal(token, backbone(whole).logits[:, -1:].argmax(-1))


def test_contexts_leave_room_for_question_and_answer():
    assert common.fitting([256, 8192, 4096], 8144) == [256, 4096, 8144]
    assert common.fitting([8192, 8160, 64], 8144) == [64, 8144]


def test_break_even():
    assert versus_prompting.break_even(600, 20) == 30
    assert versus_prompting.break_even(-5, 20) == 0
    assert versus_prompting.break_even(600, -1) == float("inf")


def test_only_rows_of_one_machine_and_model_are_drawn():
    row = {
        "kind": "answer", "hardware": "a", "model": "random", "layers": "2", "dtype": "float32", "memory_tokens": "3",
        "write_steps": "1", "context_tokens": "64", "error": "",
    }  # fmt: skip
    old, longer = row | {"date": "old"}, row | {"context_tokens": "128"}
    others = [row | {"hardware": "b"}, row | {"kind": "decode"}, row | {"error": "out of memory"}]
    assert versus_prompting.latest([old, *others, row, longer]) == [row, longer]


def test_growth_ends_where_the_model_ends(monkeypatch):
    monkeypatch.setattr(write, "cost", lambda *shape: {})
    args = common.parser("", "w").parse_args(["--device", "cpu", "--layers", "1"])
    vars(args).update(lengths=[64, 8192], steps=[1, 2], methods=["plain"], batch=1, memory=8)
    shapes = [(row["length"], row["write_steps"]) for row in write.growth(args)]
    assert shapes == [(64, 1), (8184, 1), (64, 2)]


def test_write(tmp_path):
    path = tmp_path / "w.csv"
    few = ["--device", "cpu", "--dtype", "float32", "--layers", "2", "--repeats", "1", "--memory", "3"]
    few += ["--output", str(path)]
    write.main([*few, "--batch", "2", "--lengths", "16", "--steps", "1", "--methods", "textbook", "plain"])
    write.main(["growth", *few, "--batch", "1", "--lengths", "8", "16", "--steps", "1", "2", "--methods", "plain",
                "--plot", str(tmp_path / "growth.png")])  # fmt: skip
    ways = [way for way in write.WAYS if not way.endswith("compiled")]
    write.main(["many", *few, "--contexts", "3", "--steps", "1", "--ways", *ways])
    compared, growth, many = (common.read(tmp_path / f"write_{name}.csv") for name in ("compare", "growth", "many"))
    assert [row["method"] for row in compared] == ["textbook", "plain"]
    assert [(row["length"], row["write_steps"]) for row in growth] == [("8", "1"), ("16", "1"), ("8", "2")]
    assert [row["method"] for row in many] == ways
    assert {"one by one, plain", "write_many, auto"} <= set(ways)
    for row in compared + growth + many:
        assert not row.get("error")
        assert number(row, "milliseconds") > 0
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_train_step(tmp_path):
    path = tmp_path / "train.csv"
    train_step.main(["--device", "cpu", "--layers", "1", "--length", "8", "--query", "4", "--batches", "1", "2",
                     "--steps", "1", "--many-steps", "2", "--how", "eager", "--strategies", "finite_difference",
                     "--repeats", "1", "--output", str(path)])  # fmt: skip
    rows = common.read(path)
    assert [row["method"] for row in rows] == ["textbook", "finite_difference, eager", "finite_difference, eager"]
    assert [(row["batch"], row["write_steps"]) for row in rows] == [("1", "1"), ("1", "1"), ("2", "2")]
    assert not any(row.get("error") for row in rows)


def test_a_bias_is_told_from_noise():
    torch.manual_seed(0)
    noise = torch.randn(400, 50)
    assert kv_meta_gradient.length_of_mean(list(noise)) < 0.25  # the length of a single one is 7, of their mean 0.35
    assert kv_meta_gradient.length_of_mean(list(noise + 0.2)) == pytest.approx(0.2 * 50**0.5, abs=0.1)


def test_kv_meta_gradient(capsys):
    kv_meta_gradient.main(["--pairs", "4", "--steps", "1", "--contexts", "2", "--batches", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["the exact gradient", "step 0.03", "step 0.01"]
    assert float(lines[2].split("cosine with it ")[1].split(",")[0]) > 0.99


def test_the_textbook_writes_what_we_write():
    backbone = tiny(attn_implementation="eager").requires_grad_(False)
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3, memory_init_std=0.5))
    slots = model.base_model.slots.gradmem_memory["default"].detach()
    expected = model.write(tokens(2, 9), steps=3, lr=0.3).vectors
    for second_order_steps in (None, 0):
        memory = textbook.write(model.get_base_model(), slots, tokens(2, 9), 3, 0.3, second_order_steps).detach()
        torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-5)
