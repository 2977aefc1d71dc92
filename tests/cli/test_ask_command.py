"""`gradmem ask`: answers from a text, and then from its saved state."""

import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from commands import invoke
from peft import get_peft_model
from tiny import tiny_text

from gradmem_adapter import GradMemConfig, GradMemPipeline, MemoryState, load_backbone, load_checkpoint, save_checkpoint
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.outputs import ScoredText
from gradmem_adapter.store import MemoryStore
from gradmem_adapter.write import budget


@pytest.fixture(autouse=True)
def _texts(tmp_path):
    (tmp_path / "a.txt").write_text(tiny_text(12))
    (tmp_path / "b.txt").write_text(tiny_text(9, seed=1))


def ask(*arguments):
    return invoke("ask", *arguments, "--device", "cpu", "--max-new-tokens", 4)


def answers_in(result):
    """The answers alone, without questions and support."""
    return [line.partition("  (support ")[0].strip() for line in result.stdout.splitlines() if "  (support " in line]


def test_answers_from_the_text_and_then_from_the_state_alone(checkpoint, tmp_path):
    files = ["--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt"]
    kept = ["--state", tmp_path / "kept.safetensors"]
    first = ask("w1 w2", "w3", *files, *kept, "--checkpoint", checkpoint)
    assert first.exit_code == 0, first.output
    assert "21 tokens in 6 vectors of 2 states, " in first.output
    again = ask("w1 w2", "w3", *kept, "--checkpoint", checkpoint)
    assert again.exit_code == 0, again.output
    assert answers_in(first) == answers_in(again)
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    memory = MemoryState.concat(list(MemoryState.load(tmp_path / "kept.safetensors")))
    answers = pipeline.generate(["w1 w2", "w3"], memory=memory, max_new_tokens=4)
    assert answers_in(first) == [answer.strip() for answer in answers]


def test_answers_as_json(checkpoint, tmp_path):
    result = ask("w1 w2", "w3", "--text", tmp_path / "a.txt", "--checkpoint", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["context_tokens"], printed["memory_tokens"], printed["done"]) == (12, 3, "written")
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    source = {"source": str(tmp_path / "a.txt"), "start": None, "end": None}
    memory, options = pipeline.write(tiny_text(12)), {"max_new_tokens": 4, "return_scores": True}
    for question, answer in zip(["w1 w2", "w3"], printed["answers"], strict=True):
        (expected,) = pipeline.generate([question], memory=memory, **options)
        assert answer == {
            "question": question, "answer": expected.text.strip(), "support": pytest.approx(expected.score),
            "sources": [source],
        }  # fmt: skip


def test_a_text_that_does_not_fit_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    """The system would otherwise kill the process without a message."""
    monkeypatch.setattr(budget, "UNCHECKED", 0)
    monkeypatch.setattr(budget, "free_memory", lambda device: 10**4)
    result = ask("w1", "--text", tmp_path / "a.txt", "--checkpoint", checkpoint)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "Writing a context of 12 tokens takes about" in said
    assert "gradmem write --store" in said


def test_a_state_of_another_adapter_is_refused_first(checkpoint, tmp_path):
    model, tokenizer = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.base_model.slots.gradmem_memory["default"].add_(1)
    state = tmp_path / "other.safetensors"
    GradMemPipeline(model, tokenizer).write("w1 w2").save(state)
    result = ask("w1", "--state", state, "--checkpoint", checkpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "was written by model" in result.stderr


def test_states_of_several_texts_are_asked_together(checkpoint, tmp_path):
    """`gradmem write` keeps one state per text; a question is asked of all of them, as with --text."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    states = tmp_path / "states.safetensors"
    written = invoke("write", *files, "--checkpoint", checkpoint, "--output", states, "--device", "cpu")
    assert written.exit_code == 0, written.output
    kept = ask("w1 w2", "w3", "--state", states, "--checkpoint", checkpoint)
    texts = ask("w1 w2", "w3", "--text", files[0], "--text", files[1], "--checkpoint", checkpoint)
    assert (kept.exit_code, texts.exit_code) == (0, 0), kept.output
    assert "21 tokens in 6 vectors of 2 states, " in kept.output
    assert answers_in(kept) == answers_in(texts)


def test_a_state_that_cannot_be_saved_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("gradmem_adapter.cli.ask.open_pipeline", lambda *_, **__: pytest.fail("work was done"))
    result = ask("w1", "--text", tmp_path / "a.txt", "--state", tmp_path / "no" / "x", "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert "There is no directory" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask about"),
        (["--state", "missing.safetensors"], "There is no memory state 'missing.safetensors'"),
        (["--text", "a.txt", "--state", "a.txt"], "exists. To ask it, leave the texts out"),
        (["--text", "a.txt", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_invalid_arguments_are_refused(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = ask("w1", "--checkpoint", checkpoint, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


@pytest.fixture
def refuses(checkpoint, tmp_path):
    """An adapter that says what it does not know, trained on texts of 20 tokens."""
    model, tokenizer = load_checkpoint(checkpoint)
    model.active_peft_config.refusal, model.active_peft_config.trained_length = "w7", 20
    save_checkpoint(model, tokenizer, tmp_path / "refuses")
    return tmp_path / "refuses"


def test_an_answer_is_streamed_with_its_support(refuses, tmp_path, monkeypatch):
    stream = GradMemPipeline.stream
    monkeypatch.setattr(GradMemPipeline, "stream", lambda *a, **k: iter([" one", " more"]) if stream(*a, **k) else None)
    (tmp_path / "a.txt").write_text(tiny_text(6))
    result = ask("w1 w2", "--text", tmp_path / "a.txt", "--checkpoint", refuses)
    assert result.exit_code == 0, result.output
    pipeline = GradMemPipeline(*load_checkpoint(refuses))
    (support,) = pipeline.support("w1 w2", memory=pipeline.write(tiny_text(6)))
    assert result.stdout.splitlines()[1:] == ["w1 w2", f"  one more  (support {support:.2f})"]


def test_a_refusal_names_no_source(refuses, tmp_path, monkeypatch):
    texts = ("--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt")
    for said, named in (("w7", False), ("w8", True)):
        monkeypatch.setattr(GradMemPipeline, "stream", lambda *a, _said=said, **k: iter([_said]))
        result = ask("w1 w2", *texts, "--checkpoint", refuses)
        assert "21 tokens in 12 vectors of 4 states" in result.stdout
        assert (f"  {said}  (support " in result.stdout, ".txt" in result.stdout) == (True, named)


def test_token_counts_mention_overlapping_segments(backbone, tmp_path):
    """The warning once gave one number of tokens, and the summary a larger one without explanation."""
    model, tokenizer = load_backbone(backbone)
    model = get_peft_model(model, GradMemConfig(num_memory_tokens=8, refusal="w7", trained_length=16))
    save_checkpoint(model, tokenizer, tmp_path / "overlapping")
    (tmp_path / "long.txt").write_text(tiny_text(70))
    tokens = sum(segment.tokens for segment in GradMemPipeline(model, tokenizer).segments(tiny_text(70)))
    assert tokens > 70
    result = ask("w1 w2", "--text", tmp_path / "long.txt", "--checkpoint", tmp_path / "overlapping")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "long.txt has 70 tokens, but the adapter was trained on texts of up to 16. It is written in " in said
    assert f"segments of up to 16, {tokens} in all (overlaps included). --state" in said
    assert f"{tokens} tokens (overlaps included) in " in result.stdout


def test_a_text_beyond_the_trained_length_is_written_in_segments(refuses, tmp_path):
    (tmp_path / "long.txt").write_text(tiny_text(70))
    result = ask("w1 w2", "--text", tmp_path / "long.txt", "--checkpoint", refuses, "--json")
    assert result.exit_code == 0, result.output
    assert "long.txt has 70 tokens, but the adapter was trained on texts of up to 20" in " ".join(result.stderr.split())
    printed = json.loads(result.stdout)
    pipeline = GradMemPipeline(*load_checkpoint(refuses))
    segments = list(pipeline.segments(tiny_text(70)))
    assert printed["memory_tokens"] == 3 * len(segments) > 3
    scores = pipeline.support("w1 w2", memory=pipeline.write_many([segment.text for segment in segments]))
    (source,) = printed["answers"][0]["sources"]
    best = segments[scores.index(max(scores))]
    assert (source["start"], source["end"]) == (best.start, best.end)
    assert printed["answers"][0]["support"] == pytest.approx(max(scores))


def test_more_states_than_fit_the_positions_are_refused_before_writing(checkpoint, tmp_path):
    model, tokenizer = load_checkpoint(checkpoint)
    model.active_peft_config.refusal, model.active_peft_config.trained_length = None, 6
    save_checkpoint(model, tokenizer, tmp_path / "other")
    (tmp_path / "long.txt").write_text(tiny_text(400))
    result = ask("w1 w2", "--text", tmp_path / "long.txt", "--checkpoint", tmp_path / "other")
    assert result.exit_code == 2
    assert "reads all states side by side. Use a store" in " ".join(result.stderr.split())


def test_control_vectors_are_counted_once(backbone, tmp_path):
    model, tokenizer = load_backbone(backbone)
    most = model.config.max_position_embeddings
    model = get_peft_model(model, GradMemConfig(num_memory_tokens=4, num_control_tokens=4, write_steps=0))
    save_checkpoint(model, tokenizer, tmp_path / "controlled")
    files = [tmp_path / f"{i}.txt" for i in range(most // 12 + 1)]
    for file in files:
        file.write_text("w1 w2 w3")
    result = ask("w1", *itertools.chain(*(("--text", file) for file in files)), "--checkpoint", tmp_path / "controlled")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("refusal", ["w7", None])
def test_an_adapter_that_refuses_also_splits_shorter_texts(checkpoint, refusal, tmp_path):
    model, tokenizer = load_checkpoint(checkpoint)
    model.active_peft_config.refusal, model.active_peft_config.trained_length = refusal, 40
    save_checkpoint(model, tokenizer, tmp_path / "other")
    (tmp_path / "b.txt").write_text(tiny_text(30))
    result = ask("w1 w2", "--text", tmp_path / "b.txt", "--checkpoint", tmp_path / "other", "--json")
    assert result.exit_code == 0, result.output
    assert "trained on texts of up to" not in result.stderr
    segments = list(GradMemPipeline(model, tokenizer).segments(tiny_text(30)))
    assert len(segments) > 1
    assert json.loads(result.stdout)["memory_tokens"] == 3 * (len(segments) if refusal else 1)


def test_texts_can_be_given_by_pattern_and_by_directory(refuses, tmp_path, monkeypatch):
    """Each is read by itself, and the answer says which it is from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "c.txt").write_text(tiny_text(8, seed=2))
    result = ask("w1", "--text", "[ab].txt", "--text", "notes", "--checkpoint", refuses, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["context_tokens"] == 12 + 9 + 8
    assert printed["answers"][0]["sources"][0]["source"] in ("a.txt", "b.txt", "notes/c.txt")
    shown = ask("w1", "--text", "[ab].txt", "--text", "notes", "--checkpoint", refuses)
    assert f", {printed['answers'][0]['sources'][0]['source']}: " in shown.stdout


def test_the_backbone_can_be_somewhere_else(checkpoint, backbone, tmp_path):
    (tmp_path / "backbone").rename(tmp_path / "moved")
    gone = ask("w1", "--text", tmp_path / "a.txt", "--checkpoint", checkpoint)
    assert gone.exit_code == 2
    found = ask("w1", "--text", tmp_path / "a.txt", "--checkpoint", checkpoint, "--backbone", tmp_path / "moved")
    assert found.exit_code == 0, found.output


class TestStore:
    @pytest.fixture
    def memory(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, text in (("a.txt", tiny_text(50)), ("c.txt", "w1 w2 w3 w4"), ("d.txt", "w4 w5")):
            (tmp_path / name).write_text(text)
        options = ("--checkpoint", checkpoint, "--device", "cpu", "--segment-tokens", 20)
        result = invoke("write", "a.txt", "c.txt", "d.txt", "--store", "memory", *options)
        assert result.exit_code == 0, result.output
        return MemoryStore("memory")

    def test_answers_name_their_sources(self, checkpoint, memory):
        result = ask("w4 w5", "nowhere", "--store", "memory", "--k", 2, "--checkpoint", checkpoint, "--json")
        assert result.exit_code == 0, result.output
        one, none = json.loads(result.stdout)["answers"]
        assert none == {"question": "nowhere", "answer": None, "support": None, "sources": []}
        assert one["sources"][0]["source"] == "d.txt"
        assert (one["sources"][0]["start"], one["sources"][0]["end"]) == (0, 5)
        states = memory.get([source["key"] for source in one["sources"]])
        assert len(states) == 2
        pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
        (answer,) = pipeline.generate(["w4 w5"], memory=MemoryState.concat(list(states)), max_new_tokens=4)
        assert one["answer"] == answer.strip()
        table = ask("w4 w5", "nowhere", "--store", "memory", "--checkpoint", checkpoint)
        assert "d.txt: 0-5" in table.stdout
        assert "no text in the store shares a word with it" in table.stdout

    def test_an_answer_says_that_its_source_is_incomplete(self, checkpoint, memory, tmp_path, monkeypatch):
        """Its writing was interrupted, and half a text would answer as if it were whole."""
        (tmp_path / "e.txt").write_text(tiny_text(60, seed=3))
        write = ("write", "e.txt", "--store", "memory", "--checkpoint", checkpoint, "--segment-tokens", 20)
        write_batch, batches = GradMemModel._write, []

        def stopped(model, context, *rest, **how):
            batches.append(context)
            if len(batches) > 1:
                raise KeyboardInterrupt
            return write_batch(model, context, *rest, **how)

        with monkeypatch.context() as patch:
            patch.setattr(GradMemModel, "_write", stopped)
            assert invoke(*write, "--max-tokens", 20).exit_code == 130
        (part,) = memory.entries("e.txt")
        question = (part.text, "--store", "memory", "--k", 1, "--checkpoint", checkpoint)
        for whole in (False, True):
            (source,) = json.loads(ask(*question, "--json").stdout)["answers"][0]["sources"]
            assert (source["source"], source["whole"]) == ("e.txt", whole)
            said = "e.txt is not stored to its end: write it again to continue" in ask(*question).stdout
            assert said is not whole
            assert invoke(*write).exit_code == 0

    def test_one_source_can_be_asked_alone(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = ("--checkpoint", checkpoint)
        assert invoke("write", "a.txt", "b.txt", "--store", "memory", "--segment-tokens", 20, *options).exit_code == 0
        words = [Path(name).read_text().split()[0] for name in ("a.txt", "b.txt")]
        question = (" ".join(words), "--store", "memory", *options)
        both, one = (json.loads(ask(*question, *more, "--json").stdout) for more in ((), ("--source", "b.txt")))
        assert {place["source"] for place in both["answers"][0]["sources"]} == {"a.txt", "b.txt"}
        assert {place["source"] for place in one["answers"][0]["sources"]} == {"b.txt"}
        unknown = ask(*question, "--source", "c.txt")
        assert (unknown.exit_code, "has no source 'c.txt'" in unknown.stderr) == (2, True)
        assert "--source needs --store" in ask("w1", "--text", "a.txt", "--source", "b.txt", *options).stderr

    @pytest.mark.parametrize("refusal", [False, True])
    def test_control_characters_are_escaped_for_the_terminal(self, checkpoint, refuses, tmp_path, monkeypatch, refusal):
        monkeypatch.chdir(tmp_path)
        options = ("--checkpoint", refuses if refusal else checkpoint)
        (tmp_path / "a\x1b[2J.txt").write_text("w1 w2 w3")
        assert invoke("write", "a\x1b[2J.txt", "--store", "memory", "--segment-tokens", 20, *options).exit_code == 0
        answer = "w1\x1b]0;title\x07\rw2\x9b2K\n\tw3"
        monkeypatch.setattr(GradMemPipeline, "generate", lambda *args, **kwargs: [ScoredText(answer, 0.5)])
        monkeypatch.setattr(GradMemPipeline, "stream", lambda *args, **kwargs: iter(answer))
        shown = [
            ask("w1\x1b[5m", "--store", "memory", *options).output,
            invoke("store", "list", "memory").output,
            invoke("store", "show", "memory", "a\x1b[2J.txt").output,
            ask("w1", "--text", "no\x1b[2J.txt", *options).output,
        ]
        assert not [
            char for text in shown for char in text if unicodedata.category(char) == "Cc" and char not in "\n\t"
        ]
        assert "w1\\x1b]0;title\\x07\\rw2\\x9b2K\n\tw3" in shown[0]
        assert [text.count("\\x1b[2J") for text in shown] == [1, 1, 1, 1]
        printed = json.loads(ask("w1", "--store", "memory", "--json", *options).stdout)
        assert printed["answers"][0]["answer"] == answer

    def test_an_adapter_that_refuses_reads_each_state_by_itself(self, refuses, memory):
        """The one that most likely holds an answer is read, by its support and by its search score."""
        result = ask("w4 w5", "--store", "memory", "--k", 2, "--checkpoint", refuses, "--json")
        assert result.exit_code == 0, result.output
        (one,) = json.loads(result.stdout)["answers"]
        pipeline = GradMemPipeline(*load_checkpoint(refuses))
        chosen = memory.choose(pipeline, "w4 w5", 2)
        states = memory.get([choice.entry.key for choice in chosen])
        scores = [choice.score for choice in chosen]
        options = {"max_new_tokens": 4, "do_sample": False}
        found = pipeline.surest_answer("w4 w5", memory=states, search_scores=scores, **options)
        assert len(chosen) == 2
        assert [source["key"] for source in one["sources"]] == [chosen[found.state].entry.key]
        assert (one["answer"], one["support"]) == (found.text.strip(), pytest.approx(found.score))

    def test_a_store_of_another_model_is_refused(self, checkpoint, memory, tmp_path):
        model, tokenizer = load_checkpoint(checkpoint)
        with torch.no_grad():
            model.base_model.slots.gradmem_memory["default"].add_(1)
        save_checkpoint(model, tokenizer, tmp_path / "other")
        result = ask("w4 w5", "--store", "memory", "--checkpoint", "other")
        assert result.exit_code == 2
        assert "This store has 5 states, but none was written by this model" in result.stderr

    def test_a_missing_state_file_is_named(self, checkpoint, memory):
        (entry,) = memory.entries("d.txt")
        (memory.path / "states" / entry.key[:2] / f"{entry.key}.safetensors").unlink()
        result = ask("w4 w5", "--store", "memory", "--checkpoint", checkpoint)
        assert result.exit_code == 2, result.output
        assert f"no memory state '{entry.key}' in 'memory'. If the index lists it" in " ".join(result.stderr.split())

    def test_a_damaged_state_is_named(self, checkpoint, memory):
        (entry,) = memory.entries("d.txt")
        file = memory.path / "states" / entry.key[:2] / f"{entry.key}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        result = ask("w4 w5", "--store", "memory", "--checkpoint", checkpoint)
        assert result.exit_code == 2
        assert entry.key in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--store", "a.txt"], "is a file"),
            (["--store", "nowhere"], "There is no memory store in nowhere"),
            (["--store", "memory", "--text", "a.txt"], "--store cannot be combined with --text or --state"),
            (["--store", "memory", "--state", "kept"], "--store cannot be combined with --text or --state"),
            (["--store", "memory", "--k", "0"], "Invalid value for '--k'"),
        ],
    )
    def test_invalid_store_arguments_are_refused(self, checkpoint, memory, arguments, message):
        result = ask("w4", "--checkpoint", checkpoint, *arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
