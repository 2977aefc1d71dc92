"""Questions on texts that have none: a tiny writer learns to write them, for training on."""

import gzip
import json
import os
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from evaluation.cli import app
from evaluation.data import contexts
from evaluation.questions.passages import SHORTEST, is_prose, passages
from evaluation.questions.train import WriterBatches
from evaluation.questions.writer import Writer, prompt
from evaluation.tasks import Passages

NAMES = [f"w{i}" for i in range(24)]


def piece_tokenizer():
    """A tokenizer of words with the space before them, and of line ends."""
    fixed = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "\n",
        "Q",
        "A",
        ":",
        " Where",
        " is",
        "?",
        ".",
        "Story",
        "Questions",
        " and",
        " answers",
    ]
    vocabulary = {text: i for i, text in enumerate([*fixed, *NAMES, *(f" {name}" for name in NAMES)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w ]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def facts(seed):
    """A passage of three facts, with a question on each. All are in one place, which is quick to learn."""
    names = random.Random(seed).sample(NAMES[:-1], 3)
    return " ".join(f"{name} is {NAMES[-1]}." for name in names), [(f"Where is {name}?", NAMES[-1]) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, questions to learn from, and texts that have none."""
    path = tmp_path_factory.mktemp("questions")
    tokenizer = piece_tokenizer()
    tiny(vocab_size=len(tokenizer), scale=1.0, max_position_embeddings=256).save_pretrained(path / "backbone")
    tokenizer.save_pretrained(path / "backbone")
    made = [facts(seed) for seed in range(8)]
    for name, lines in (
        ("data", [{"context": c, "query": q, "target": a} for c, pairs in made for q, a in pairs]),
        ("texts", [{"context": c} for c, _ in made]),
    ):
        (path / name).mkdir()
        (path / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(*arguments):
    return CliRunner().invoke(app, ["questions", *map(str, arguments), "--device", "cpu"])


def train(folder, *arguments):
    sizes = ["--epochs", 60, "--tokens", 512, "--learning-rate", 0.01]
    run = [f"story={folder / 'data'}", "--output", folder / "run", "--backbone", folder / "backbone"]
    return command("train", *run, *sizes, *arguments)


def write(writer, folder, output, *arguments):
    return command("write", writer, folder / "texts", "--kind", "story", "--output", output, *arguments)


@pytest.fixture(scope="module")
def writer(folder):
    result = train(folder)
    assert result.exit_code == 0, result.output
    return folder / "run" / "checkpoint"


def test_a_writer_makes_questions_that_can_be_trained_on(folder, writer, tmp_path):
    result = write(writer, folder, tmp_path / "train.jsonl")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    asked = contexts(folder / "texts", "train")
    assert len(lines) > 8
    assert [line["context"] for line in lines] == sorted((line["context"] for line in lines), key=asked.index)
    for line in lines:
        assert line.keys() == {"context", "query", "target", "support"}
        assert re.fullmatch(r"Where is w\d+\?", line["query"])
        assert -0.5 <= line["support"] < 0
    assert {line["target"] for line in lines} == {NAMES[-1]}
    rows = Passages(source=str(tmp_path), unanswerable=0.2, nearby=True).training_rows()
    assert sum(len(row["queries"]) for row in rows) >= len({(line["context"], line["query"]) for line in lines})
    assert os.listdir(tmp_path) == ["train.jsonl"]


def test_an_interrupted_command_can_be_continued(folder, writer, tmp_path, monkeypatch):
    """It then writes the same as without the interrupt."""
    monkeypatch.setattr("evaluation.questions.write.PART", 3)
    assert write(writer, folder, tmp_path / "whole.jsonl").exit_code == 0
    asked, ask = [], Writer.ask

    def interrupted(self, texts):
        asked.append(texts)
        if len(asked) == 2:
            raise OSError("no power")
        return ask(self, texts)

    monkeypatch.setattr(Writer, "ask", interrupted)
    assert "no power" in write(writer, folder, tmp_path / "train.jsonl.gz").output
    result = write(writer, folder, tmp_path / "train.jsonl.gz", "--seed", 1)
    assert (result.exit_code, "seed differs" in result.output) == (2, True)
    assert write(writer, folder, tmp_path / "train.jsonl.gz").exit_code == 0
    assert [len(texts) for texts in asked] == [3, 3, 3, 2]
    assert gzip.decompress((tmp_path / "train.jsonl.gz").read_bytes()) == (tmp_path / "whole.jsonl").read_bytes()


def test_support_is_the_mean_log_probability_of_an_answer(writer):
    """Over its tokens and its line end, whatever else is in the batch."""
    asking = Writer(str(writer), "story", torch.device("cpu"), 4096)
    texts = ["w1 is w13.", "w1 is w13. w2 is w14. w3 is w15."]
    for text, (answer, support) in zip(texts, asking.answer(texts, ["Where is w1?"] * 2), strict=True):
        start = asking.tokenizer(prompt("story", text) + "Q: Where is w1?\nA:")["input_ids"]
        ids = torch.tensor([start + asking.tokenizer(f" {answer}\n")["input_ids"]])
        logits = asking.model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
        assert logits.argmax(-1).tolist() == ids[0, len(start) :].tolist()
        assert support == pytest.approx(logits.amax(-1).mean().item(), abs=1e-4)
    assert asking.answer([], []) == asking.ask([]) == []


def test_two_answers_must_agree(folder, writer, tmp_path, monkeypatch):
    first = {"w1": NAMES[-1], "w2": "w0", "w3": f"The {NAMES[-1].title()} {NAMES[-1]}"}
    asked = [(0, f"Where is {name}?", answer) for name, answer in first.items()]
    monkeypatch.setattr(Writer, "ask", lambda self, texts: asked)
    for agreement, left in ((0, ["w1", "w2", "w3"]), (0.5, ["w1", "w3"]), (1, ["w1"])):
        output = tmp_path / f"{agreement}.jsonl"
        assert write(writer, folder, output, "--agreement", agreement).exit_code == 0
        found = [json.loads(line)["query"] for line in output.read_text().splitlines()]
        assert found == [f"Where is {name}?" for name in left]


def test_invalid_arguments_are_refused(folder, writer, tmp_path):
    (tmp_path / "there.jsonl").touch()
    for output, arguments, message in (
        (tmp_path / "train.txt", [], "must be a .jsonl or .jsonl.gz file"),
        (tmp_path / "there.jsonl", [], "exists"),
        (tmp_path / "no" / "train.jsonl", [], "There is no directory"),
        (tmp_path / "train.jsonl", ["--kind", "poem"], "was trained on texts of the kinds story, got 'poem'"),
        (tmp_path / "train.jsonl", ["--longest", 3], "has no passage of at most 3 tokens"),
        (tmp_path / "train.jsonl", ["--limit", 1, "--support", 0], "No question is left"),
    ):
        result = write(writer, folder, output, *arguments)
        assert (result.exit_code, message in " ".join(result.output.split())) == (2, True), result.output
    assert "is not a writer of questions" in write(folder / "backbone", folder, tmp_path / "other.jsonl").output
    assert "seed differs" in train(folder, "--seed", 1).output
    assert "such as story=data" in command("train", "data/squad", "--output", tmp_path / "run").output


def test_training_batches_of_a_writer():
    tokenizer = piece_tokenizer()
    rows = [
        {"context": context, "queries": [q for q, _ in pairs * 4], "targets": [a for _, a in pairs * 4]}
        for context, pairs in map(facts, range(30))
    ]
    made = WriterBatches([("story", rows)], tokenizer, 600, 40)
    for batch in (made[i] for i in range(len(made))):
        assert sum(1 for _ in batch) * max(len(example["input_ids"]) for example in batch) <= 600
        for example in batch:
            start = example["labels"].count(-100)
            assert example["input_ids"][start:] == example["labels"][start:]
            head, pairs = (
                tokenizer.decode(part) for part in (example["input_ids"][:start], example["input_ids"][start:])
            )
            assert head == prompt("story", next(row["context"] for row in rows if row["context"] in head))
            assert re.fullmatch(r"(Q: Where is w\d+\?\nA: w\d+\n){8}</s>", pairs)
    assert sum(len(made[i]) for i in range(len(made))) == 30
    assert made[0] != made[0]
    with pytest.raises(ValueError, match="no passage of at most 4 tokens"):
        WriterBatches([("story", rows)], tokenizer, 600, 4)


LINES = st.lists(
    st.sampled_from([" = A Heading = ", "1 + 1 = 2", *(" ".join(["Some words here."] * n) for n in (1, 20, 90))])
)


@settings(deadline=None, max_examples=40)
@given(LINES, st.integers(60, 200), st.integers(0, 3))
def test_passages_are_runs_of_prose_in_order(tmp_path_factory, lines, longest, seed):
    source = tmp_path_factory.mktemp("text")
    tokenizer = piece_tokenizer()
    lines = [line.replace("Some", f"w{i}") if is_prose(line) else line for i, line in enumerate(lines)]
    (source / "train.txt").write_text("\n".join(lines))
    found = list(passages(source, "train", tokenizer, longest, random.Random(seed)))
    assert found == list(passages(source, "train", tokenizer, longest, random.Random(seed)))
    for text in found:
        assert len(tokenizer(text)["input_ids"]) <= longest
        assert len(text.split()) >= SHORTEST
        numbers = [int(number) for number in re.findall(r"w(\d+)", text)]
        assert numbers == sorted(numbers)
        assert all(is_prose(lines[i]) for i in range(numbers[0], numbers[-1] + 1))
    words = sum(len(line.split()) for line in lines if is_prose(line))
    assert sum(len(text.split()) for text in found) <= words


@pytest.mark.parametrize(
    ("line", "prose"),
    [("“Well,” said he; “and why not?”", True), (" = = Chapter I = = ", False), ("| 1.5 | 2.5 |", False),
     ("In 1815 he came home.", False), ("The battle was lost in 1815, and he came home without his hat.", True)],
)  # fmt: skip
def test_prose_is_recognised(line, prose):
    assert is_prose(line) == prose
