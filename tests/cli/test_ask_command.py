"""`gradmem ask`: answers from a text, and then from what was kept of it."""

import json

import pytest
from commands import invoke
from tiny import tiny_text

from gradmem_adapter import GradMemPipeline, MemoryState, load_checkpoint


@pytest.fixture(autouse=True)
def _texts(tmp_path):
    (tmp_path / "a.txt").write_text(tiny_text(12))
    (tmp_path / "b.txt").write_text(tiny_text(9, seed=1))


def ask(*arguments):
    return invoke("ask", *arguments, "--device", "cpu", "--max-new-tokens", 4)


def test_answers_from_the_text_and_then_from_the_state_alone(checkpoint, tmp_path):
    files = ["--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt"]
    kept = ["--state", tmp_path / "kept.safetensors"]
    first = ask("w1 w2", "w3", *files, *kept, "--checkpoint", checkpoint)
    assert first.exit_code == 0, first.output
    assert "21 tokens are in 6 vectors" in first.output
    again = ask("w1 w2", "w3", *kept, "--checkpoint", checkpoint)
    assert again.exit_code == 0, again.output
    table = first.output[first.output.index("asked") :]
    assert table == again.output[again.output.index("asked") :]
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    memory = MemoryState.load(tmp_path / "kept.safetensors")
    answers = pipeline.generate(["w1 w2", "w3"], memory=memory, max_new_tokens=4)
    assert all(answer.strip() in table for answer in answers)


def test_answers_for_programs(checkpoint, tmp_path):
    result = ask("w1 w2", "w3", "--text", tmp_path / "a.txt", "--checkpoint", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["context_tokens"], printed["memory_tokens"], printed["written"]) == (12, 3, True)
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    expected = pipeline.generate(["w1 w2", "w3"], memory=pipeline.write(tiny_text(12)), max_new_tokens=4)
    assert printed["answers"] == [
        {"question": question, "answer": answer.strip()}
        for question, answer in zip(["w1 w2", "w3"], expected, strict=True)
    ]


def test_states_of_several_texts_are_asked_together(checkpoint, tmp_path):
    """`gradmem write` keeps one state per text; a question is asked of all of them, as with --text."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    states = tmp_path / "states.safetensors"
    written = invoke("write", *files, "--checkpoint", checkpoint, "--output", states, "--device", "cpu")
    assert written.exit_code == 0, written.output
    kept = ask("w1 w2", "w3", "--state", states, "--checkpoint", checkpoint)
    texts = ask("w1 w2", "w3", "--text", files[0], "--text", files[1], "--checkpoint", checkpoint)
    assert (kept.exit_code, texts.exit_code) == (0, 0), kept.output
    assert "21 tokens are in 6 vectors" in kept.output
    tables = [result.output[result.output.index("asked") :] for result in (kept, texts)]
    assert tables[0] == tables[1]


def test_a_state_that_cannot_be_kept_is_refused_before_the_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("gradmem_adapter.cli.ask.load_checkpoint", lambda *_, **__: pytest.fail("work was done"))
    result = ask("w1", "--text", tmp_path / "a.txt", "--state", tmp_path / "no" / "x", "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert "There is no directory" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask about"),
        (["--state", "missing.safetensors"], "nothing to ask about"),
        (["--text", "a.txt", "--state", "a.txt"], "exists. Leave the texts out"),
        (["--text", "a.txt", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = ask("w1", "--checkpoint", checkpoint, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
