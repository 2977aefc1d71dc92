"""`gradmem demo`: what it prints, and its exit status."""

import io
import json
import re

import pytest
import torch
from commands import invoke
from peft import get_peft_model
from rich.console import Console
from tiny import tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import GradMemConfig, save_checkpoint
from gradmem_adapter.cli.demos import recite
from gradmem_adapter.cli.demos.key_values import draw_pairs, run_key_value_demo
from gradmem_adapter.cli.demos.recite import demo_text, run_recite_demo
from gradmem_adapter.cli.demos.story import run_story_demo

KEYS = ["reconstructed", "context_tokens", "memory_tokens", "state_bytes", "kv_cache_bytes", "write_seconds"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(48) + "\n", encoding="utf-8")
    return path


def test_a_text_that_is_not_recited_gives_status_1(backbone, text):
    result = invoke("demo", "--task", "recite", "--text", text, "--backbone", backbone, "--steps", 2, "--json")
    assert result.exit_code == 1, result.output
    values = json.loads(result.stdout)["recite"]
    assert list(values) == KEYS
    assert values["reconstructed"] is False
    assert values["context_tokens"] == 48
    assert values["memory_tokens"] == 9
    assert values["state_bytes"] > 9 * 32 * 4
    assert values["kv_cache_bytes"] == 48 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, width, bytes
    assert values["write_seconds"] >= 0


def test_without_json_the_figures_are_put_into_words(backbone, text):
    result = invoke("demo", "--task", "recite", "--text", text, "--backbone", backbone, "--steps", 2)
    assert result.exit_code == 1, result.output
    assert "KV cache of the same text takes 12,288 bytes" in " ".join(result.stdout.split())
    assert "{" not in result.stdout


def test_a_text_that_is_recited_gives_status_0(backbone, tmp_path, monkeypatch):
    parrot = tiny()  # a model that repeats each token
    with torch.no_grad():
        for name, parameter in parrot.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        parrot.lm_head.weight.copy_(parrot.get_input_embeddings().weight)
    parrot.save_pretrained(backbone)
    path = tmp_path / "easy.txt"
    path.write_text("w1 " * 48, encoding="utf-8")
    monkeypatch.setattr(recite, "LR", 0.1)
    result = invoke("demo", "--task", "recite", "--text", path, "--backbone", backbone, "--memory-tokens", 12, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recite"]["reconstructed"] is True


def test_brackets_are_printed_as_text(backbone, tmp_path):
    text = "[/bold] [red] " + tiny_text(46)
    output = io.StringIO()
    result = run_recite_demo(text, backbone=backbone, steps=1, console=Console(file=output, width=120))
    assert "[/bold] [red]" in output.getvalue()
    assert result["context_tokens"] == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-tokens", "13"], "13 memory tokens for 48 text tokens: the demo takes from 1 to 12, a quarter"),
        (["--memory-tokens", "0"], "0 memory tokens for 48 text tokens"),
        (["--steps", "-1"], "steps must be a non-negative integer"),
    ],
)
def test_invalid_numbers_are_refused(backbone, text, arguments, message):
    result = invoke("demo", "--task", "recite", "--text", text, "--backbone", backbone, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (39, "The text has 39 tokens, but the demo needs at least 40"),
        (0, "The text has 0 tokens"),
        (200, "Context 0 has 200 tokens"),
    ],
)
def test_a_text_of_the_wrong_length_is_refused(backbone, text, count, message):
    text.write_text(tiny_text(count), encoding="utf-8")
    result = invoke("demo", "--task", "recite", "--text", text, "--backbone", backbone)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_missing_files_are_refused(text, tmp_path):
    missing = f"{tmp_path}/none"
    result = invoke("demo", "--task", "recite", "--text", text, "--backbone", missing)
    assert result.exit_code == 2
    assert "There is no directory" in " ".join(result.stderr.split())
    assert invoke("demo", "--task", "recite", "--text", missing).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [["--task", "kv", "--checkpoint", ""], ["--task", "ask", "--checkpoint", ""],
     ["--task", "recite", "--steps", 1, "--backbone", ""]],
)  # fmt: skip
def test_an_empty_name_is_not_the_default(arguments):
    result = invoke("demo", *arguments)
    assert result.exit_code == 2, result.output


def test_a_file_that_is_not_text_is_refused(backbone, text):
    text.write_bytes(b"\xff\xfe\xff" * 20)
    result = invoke("demo", "--task", "recite", "--text", text, "--backbone", backbone)
    assert result.exit_code == 2
    assert "utf-8" in result.stderr


def test_the_shipped_text_is_long_enough():
    assert len(demo_text().split()) >= 40
    assert demo_text() == demo_text().strip()


@pytest.mark.smollm
def test_the_shipped_text_is_recited():
    result = invoke("demo", "--task", "recite", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)["recite"]
    assert values["reconstructed"] is True
    assert values["memory_tokens"] * 4 <= values["context_tokens"]


class TestKeyValues:
    def test_values_are_retrieved(self):
        result = run_key_value_demo("kv-retrieval", pairs=8, steps=5, console=Console(quiet=True))
        assert result["exact_match"] > 0.8
        assert (result["pairs"], result["memory_tokens"], result["context_tokens"]) == (8, 8, 57)

    def test_pairs_are_random_and_keys_unique(self):
        pairs = draw_pairs(3000, seed=0)
        assert len(pairs) == 3000
        assert all(len(key) == len(value) == 2 for key, value in pairs.items())
        assert pairs == draw_pairs(3000, seed=0) != draw_pairs(3000, seed=1)

    def test_the_command_reports_its_figures(self):
        result = invoke("demo", "--task", "kv", "--pairs", 4, "--steps", 3, "--json")
        assert result.exit_code == 0, result.output
        values = json.loads(result.stdout)["kv"]
        assert (values["pairs"], values["write_steps"]) == (4, 3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--checkpoint", "nowhere"), "nowhere"),
            (("--pairs", 0), "pairs must be from 1 to 3844"),
            (("--pairs", 500), "Context 0 has 3,501 tokens"),
        ],
    )
    def test_invalid_arguments_are_refused(self, arguments, message):
        result = invoke("demo", "--task", "kv", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


class TestStory:
    @pytest.mark.smollm
    def test_answers_from_memory_and_refuses_what_is_not_there(self):
        result = run_story_demo("smollm2-135m-qa", console=Console(quiet=True))
        right = ("a gold ring", "scared|terrified", "the Many-furred Creature")
        for answer, target in zip(result["from_memory"][:3], right, strict=True):
            assert re.search(target, answer, re.IGNORECASE)
        assert result["from_memory"][3:] == ["not in memory"] * 3
        assert min(result["support"][:3]) > max(result["support"][3:])
        assert (result["context_tokens"], result["states"], result["memory_tokens"]) == (207, 3, 64)
        assert result["kv_cache_bytes"] == 207 * 30 * 2 * 3 * 64 * 4
        assert result["state_bytes"] < result["kv_cache_bytes"] / 60

    def test_questions_follow_the_recital(self, tmp_path, text):
        backbone = tiny(max_position_embeddings=512)
        backbone.save_pretrained(tmp_path / "backbone")
        tiny_tokenizer().save_pretrained(tmp_path / "backbone")
        backbone.name_or_path = str(tmp_path / "backbone")
        model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=4, query_format="chat"))
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "adapter")
        command = ["demo", "--checkpoint", tmp_path / "adapter", "--backbone", tmp_path / "backbone"]
        result = invoke(*command, "--steps", 1, "--text", text, "--json")
        assert result.exit_code == 1, result.output  # one step recites nothing
        told = json.loads(result.stdout)
        assert list(told) == ["recite", "ask"]
        values = told["ask"]
        assert len(values["from_memory"]) == len(values["from_text"]) == len(values["support"]) == 6
        assert values["memory_tokens"] == 4
