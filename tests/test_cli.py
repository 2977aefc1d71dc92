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
