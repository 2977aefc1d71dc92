"""The LangChain examples run: on a tiny random model, and (slow) on SmolLM2 as the documentation shows them."""

import re

import pytest


def check_rag(output):
    with_memory = [int(n) for n in re.findall(r"from memory \((\d+) prompt tokens", output)]
    with_text = [int(n) for n in re.findall(r"from text   \((\d+) prompt tokens", output)]
    assert len(with_memory) == len(with_text) == 2
    assert all(m < t for m, t in zip(with_memory, with_text, strict=True))
    assert re.findall(r"new writes: (\d)", output) == ["2", "0"]


def check_conversation(output, turns):
    rows = [line.split() for line in output.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    assert [int(row[0]) for row in rows] == list(range(1, turns + 1))
    tokens = [int(row[1]) for row in rows]
    assert max(tokens[turns // 2 :]) <= max(tokens[: turns // 2]) + 32
    assert int(rows[-1][2]) > tokens[-1], "there is little in memory"
    assert "My dog is called Biscuit." in output
    assert "greedy decoding gets back" in output


def check_agent(output):
    assert "ended with signal 9" in output
    turns = re.findall(r"turn (\d): (\d+) messages, \d+ prompt tokens, (\d+) of them memory, (\d+) writes", output)
    assert [int(turn) for turn, *_ in turns] == list(range(1, 8))
    assert [int(messages) for _, messages, *_ in turns] == list(range(2, 16, 2))
    assert int(turns[-1][2]) > 0


@pytest.mark.smollm  # its embedding comes with that package's installation
def test_rag(run, checkpoint):
    check_rag(run("langchain_rag.py", "--checkpoint", checkpoint))


def test_conversation(run, checkpoint):
    check_conversation(run("langchain_conversation.py", "--checkpoint", checkpoint), 30)


def test_agent(run, checkpoint):
    check_agent(run("langchain_agent.py", "--checkpoint", checkpoint))


@pytest.mark.slow
@pytest.mark.smollm
def test_on_smollm(run):
    check_rag(run("langchain_rag.py"))
    check_conversation(run("langchain_conversation.py"), 30)
    check_agent(run("langchain_agent.py"))
