"""The LangChain examples run: on a tiny random model, and (slow) on SmolLM2 as the documentation shows them."""

import json
import re

import pytest
from tiny import tiny_text


def check_rag(output, questions):
    found = re.findall(r"from (\w+): F1 ([\d.]+), (\d+) prompt tokens, [\d.]+ s a question, (\d+) questions", output)
    assert [name for name, *_ in found] == ["text", "memory"]
    (_, _, text_tokens, _), (_, _, memory_tokens, count) = found
    assert int(memory_tokens) < int(text_tokens)
    assert int(count) == questions
    assert f"{questions} states written" in output


def check_conversation(output, turns):
    rows = re.findall(r"^ *(\d+)  (\S.*?) +(\d) of 8 +(\d+)$", output, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [turns // 4] * 3 + [turns // 2] * 3 + [turns] * 3
    memory, recent, text = ([int(row[3]) for row in rows[i::3]] for i in range(3))
    assert recent[-1] < memory[-1] < text[-1]
    assert text[-1] > 2 * text[0]
    assert "after the session was cleared: 0" in output


def check_agent(output):
    assert "ended with signal 9" in output
    turns = re.findall(r"turn (\d): (\d+) messages, \d+ prompt tokens, (\d+) of them memory, (\d+) writes", output)
    assert [int(turn) for turn, *_ in turns] == list(range(1, 8))
    assert [int(messages) for _, messages, *_ in turns] == list(range(2, 16, 2))
    assert int(turns[-1][2]) > 0


@pytest.mark.smollm  # its embedding comes with that package's installation
def test_rag(run, checkpoint, tmp_path):
    rows = [{"context": tiny_text(40, seed=i), "query": "w1", "answers": ["w2"]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    check_rag(
        run("langchain_rag.py", "--checkpoint", checkpoint, "--rows", tmp_path / "rows.jsonl", "--documents", 3), 3
    )


def test_conversation(run, checkpoint):
    check_conversation(run("langchain_conversation.py", "--checkpoint", checkpoint, "--turns", 20), 20)


def test_agent(run, checkpoint):
    check_agent(run("langchain_agent.py", "--checkpoint", checkpoint))


@pytest.mark.slow
@pytest.mark.smollm
def test_on_smollm(run):
    check_rag(run("langchain_rag.py"), 4)
    check_conversation(run("langchain_conversation.py"), 40)
    check_agent(run("langchain_agent.py"))
