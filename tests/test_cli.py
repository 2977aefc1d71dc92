"""The `gradmem` command: what it prints, and with which exit status it ends."""

import io
import json

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from tiny import tiny, tiny_text, tiny_tokenizer
from typer.testing import CliRunner

from gradmem_adapter import (
    GradMemConfig,
    GradMemModel,
    GradMemPipeline,
    MemoryState,
    load_backbone,
    load_checkpoint,
    save_checkpoint,
)
from gradmem_adapter.cli import app
from gradmem_adapter.demo import demo_text, run_demo

KEYS = ["reconstructed", "context_tokens", "memory_tokens", "state_bytes", "kv_cache_bytes", "write_seconds"]


@pytest.fixture
def backbone(tmp_path):
    tiny().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(48) + "\n", encoding="utf-8")
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def figures(output):
    name, _, values = output.strip().splitlines()[-1].partition(": ")
    assert name == "demo"
    return json.loads(values)


def test_help():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "GradMem" in result.output
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    for option in ("--text", "--backbone", "--memory-tokens", "--steps", "--lr", "--seed"):
        assert option in result.output


def test_text_that_does_not_come_back(backbone, text):
    result = invoke("demo", "--text", text, "--backbone", backbone, "--steps", 2)
    assert result.exit_code == 1, result.output
    values = figures(result.stdout)
    assert list(values) == KEYS
    assert values["reconstructed"] is False
    assert values["context_tokens"] == 48
    assert values["memory_tokens"] == 9
    assert values["state_bytes"] > 9 * 32 * 4
    assert values["kv_cache_bytes"] == 48 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, width, bytes
    assert values["write_seconds"] >= 0


def test_text_that_comes_back(backbone, tmp_path):
    parrot = tiny()  # a model that says each token again
    with torch.no_grad():
        for name, parameter in parrot.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        parrot.lm_head.weight.copy_(parrot.get_input_embeddings().weight)
    parrot.save_pretrained(backbone)
    path = tmp_path / "easy.txt"
    path.write_text("w1 " * 48, encoding="utf-8")
    result = invoke("demo", "--text", path, "--backbone", backbone, "--memory-tokens", 12, "--lr", 0.1)
    assert result.exit_code == 0, result.output
    assert figures(result.stdout)["reconstructed"] is True


def test_brackets_are_text_and_no_markup(backbone, tmp_path):
    text = "[/bold] [red] " + tiny_text(46)
    output = io.StringIO()
    run_demo(text, backbone=backbone, steps=1, console=Console(file=output, width=120))
    assert "[/bold] [red]" in output.getvalue()
    assert list(figures(output.getvalue())) == KEYS


def test_same_seed_same_outcome(backbone, capsys):
    quiet = {"backbone": backbone, "steps": 1}
    first, second = (run_demo(tiny_text(40), seed=seed, **quiet) for seed in (0, 0))
    assert (first.reconstructed, first.state_bytes) == (second.reconstructed, second.state_bytes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-tokens", "13"], "13 memory tokens for 48 text tokens: the demo takes 1 to 12, a quarter"),
        (["--memory-tokens", "0"], "0 memory tokens for 48 text tokens"),
        (["--lr", "0"], "lr must be a finite positive number"),
        (["--steps", "-1"], "steps must be an integer from 0"),
    ],
)
def test_numbers_that_cannot_work(backbone, text, arguments, message):
    result = invoke("demo", "--text", text, "--backbone", backbone, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (39, "The text has 39 tokens; the demo needs at least 40"),
        (0, "The text has 0 tokens"),
        (200, "Context 0 has 200 tokens"),
    ],
)
def test_text_of_a_wrong_length(backbone, text, count, message):
    text.write_text(tiny_text(count), encoding="utf-8")
    result = invoke("demo", "--text", text, "--backbone", backbone)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_missing_files(text, tmp_path):
    missing = f"{tmp_path}/none"
    result = invoke("demo", "--text", text, "--backbone", missing)
    assert result.exit_code == 2
    assert "there is no such directory" in " ".join(result.stderr.split())
    assert invoke("demo", "--text", missing).exit_code == 2


def test_file_that_is_no_text(backbone, text):
    text.write_bytes(b"\xff\xfe\xff" * 20)
    result = invoke("demo", "--text", text, "--backbone", backbone)
    assert result.exit_code == 2
    assert "utf-8" in result.stderr


def test_text_that_ships():
    assert len(demo_text().split()) >= 40
    assert demo_text() == demo_text().strip()


@pytest.fixture
def checkpoint(backbone, tmp_path):
    model, tokenizer = load_backbone(backbone)
    model = get_peft_model(model, GradMemConfig(num_memory_tokens=3, write_steps=2, write_lr=0.3))
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def files_of(tmp_path, *texts):
    files = [tmp_path / f"{i}[b].txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def test_write(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [tiny_text(count, seed=count) for count in (7, 30, 12)]
    files = [file.name for file in files_of(tmp_path, *texts)]
    arguments = ("--checkpoint", "checkpoint", "--device", "cpu", "--max-tokens", 30)
    result = invoke("write", *files, "--output", "states.safetensors", *arguments)
    assert result.exit_code == 0, result.output
    states = MemoryState.load("states.safetensors")
    expected = GradMemPipeline(*load_checkpoint(checkpoint)).write(texts)
    torch.testing.assert_close(states.vectors, expected.vectors, rtol=1e-4, atol=1e-6)
    assert states.context_tokens.tolist() == [7, 30, 12]
    rows = [line.split() for line in result.stdout.splitlines() if ".txt" in line]
    losses = [f"{loss:.4f}" for loss in states.write_losses[:, -1].tolist()]
    assert [row[1::2] for row in rows] == [
        [name, tokens, str(3 * 32 * 4), loss]
        for name, tokens, loss in zip(files, ("7", "30", "12"), losses, strict=True)
    ]
    assert "WRITE" not in result.stderr  # no terminal, no progress bar
    steps = invoke("write", files[0], "--output", "steps.safetensors", "--steps", 5, *arguments)
    assert steps.exit_code == 0, steps.output
    assert MemoryState.load("steps.safetensors").write_losses.shape == (1, 6)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (" \n", [], "1[b].txt is empty"),
        (tiny_text(200), [], "Context 1 of 2 cannot be written. It has 200 tokens, and at most 93"),
        ("w1", ["--steps", "-1"], "steps must be an integer from 0"),
        ("w1", ["--max-tokens", "0"], "max_tokens must be an integer from 1"),
        ("w1", ["--output", "none/states"], "There is no directory 'none'"),
        ("w1", ["--output", "."], "is a directory"),
        ("w1", ["--checkpoint", "backbone"], "adapter_config.json"),
    ],
)
def test_what_cannot_be_written(checkpoint, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = files_of(tmp_path, "w1 w2", text)
    usual = ["--checkpoint", checkpoint, "--output", "states.safetensors", "--device", "cpu"]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(a) for a in ("write", *files, *usual, *arguments)])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "states.safetensors").exists()


def test_write_files_that_are_no_text(checkpoint, tmp_path):
    (file,) = files_of(tmp_path, "w1")
    file.write_bytes(b"\xff\xfe")
    result = invoke("write", file, "--checkpoint", checkpoint, "--output", tmp_path / "states")
    assert result.exit_code == 2
    assert "is no text in UTF-8" in " ".join(result.stderr.split())


def test_write_out_of_memory(checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GradMemModel, "write", fail)
    arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "states", "--device", "cpu")
    result = invoke("write", *files_of(tmp_path, "w1 w2"), *arguments)
    assert result.exit_code == 2
    assert "Context 0 with 2 tokens does not fit" in " ".join(result.stderr.split())


@pytest.mark.smollm
def test_demo():
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    values = figures(result.stdout)
    assert values["reconstructed"] is True
    assert values["memory_tokens"] * 4 <= values["context_tokens"]


class TestAsk:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        tiny().save_pretrained(tmp_path / "backbone")
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(tmp_path / "backbone")
        backbone, _ = load_backbone(str(tmp_path / "backbone"))
        config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, memory_init_std=0.5, query_format="chat")
        save_checkpoint(get_peft_model(backbone, config), tokenizer, tmp_path / "model")
        (tmp_path / "a.txt").write_text(tiny_text(12))
        (tmp_path / "b.txt").write_text(tiny_text(9, seed=1))
        return tmp_path / "model"

    def run(self, *arguments):
        return CliRunner().invoke(app, ["ask", *map(str, arguments), "--device", "cpu", "--max-new-tokens", "4"])

    def test_answers_from_the_text_and_then_from_the_state_alone(self, checkpoint, tmp_path):
        files = ["--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt"]
        kept = ["--state", tmp_path / "kept.safetensors"]
        first = self.run("w1 w2", "w3", *files, *kept, "--checkpoint", checkpoint)
        assert first.exit_code == 0, first.output
        assert "21 tokens are in 6 vectors" in first.output
        again = self.run("w1 w2", "w3", *kept, "--checkpoint", checkpoint)
        assert again.exit_code == 0, again.output
        table = first.output[first.output.index("asked") :]
        assert table == again.output[again.output.index("asked") :]
        pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
        memory = MemoryState.load(tmp_path / "kept.safetensors")
        answers = pipeline.generate(["w1 w2", "w3"], memory=memory, max_new_tokens=4)
        assert all(answer.strip() in table for answer in answers)

    def test_states_of_several_texts_are_asked_together(self, checkpoint, tmp_path):
        """`gradmem write` keeps one state per text; a question is asked of all of them, as with --text."""
        files = [tmp_path / "a.txt", tmp_path / "b.txt"]
        states = tmp_path / "states.safetensors"
        written = invoke("write", *files, "--checkpoint", checkpoint, "--output", states, "--device", "cpu")
        assert written.exit_code == 0, written.output
        kept = self.run("w1 w2", "w3", "--state", states, "--checkpoint", checkpoint)
        texts = self.run("w1 w2", "w3", "--text", files[0], "--text", files[1], "--checkpoint", checkpoint)
        assert (kept.exit_code, texts.exit_code) == (0, 0), kept.output
        assert "21 tokens are in 6 vectors" in kept.output
        tables = [result.output[result.output.index("asked") :] for result in (kept, texts)]
        assert tables[0] == tables[1]

    def test_a_state_that_cannot_be_kept_is_refused_before_the_work(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr("gradmem_adapter.asking.load_checkpoint", lambda *_, **__: pytest.fail("work was done"))
        result = self.run(
            "w1", "--text", tmp_path / "a.txt", "--state", tmp_path / "no" / "x", "--checkpoint", checkpoint
        )
        assert result.exit_code == 2
        assert "There is no directory" in " ".join(result.stderr.split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "nothing to ask about"),
            (["--state", "missing.safetensors"], "nothing to ask about"),
            (["--text", "a.txt", "--state", "a.txt"], "holds what was written before"),
            (["--text", "a.txt", "--checkpoint", "nowhere"], "nowhere"),
        ],
    )
    def test_what_cannot_work(self, checkpoint, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        result = self.run("w1", "--checkpoint", checkpoint, *arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
