"""`gradmem store`: what is in a memory store, and whether it is whole."""

import json

import pytest
from commands import invoke
from tiny import tiny_text

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.store import MemoryStore


@pytest.fixture(autouse=True)
def memory(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.txt", tiny_text(50)), ("[b].txt", "w1 w2 w3 w4")):
        (tmp_path / name).write_text(text)
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--segment-tokens", 20)
    result = invoke("write", "a.txt", "[b].txt", "--store", "memory", *options)
    assert result.exit_code == 0, result.output
    return MemoryStore("memory")


def store(command, *arguments, status=0):
    """What `gradmem store` prints, and what it prints for programs."""
    printed = invoke("store", command, "memory", *arguments)
    assert printed.exit_code == status, printed.output
    figures = invoke("store", command, "memory", *arguments, "--json")
    assert figures.exit_code == status, figures.output
    return printed.stdout, json.loads(figures.stdout)


def damage(memory, source):
    entry = next(memory.entries(source))
    file = memory.path / "states" / entry.key[:2] / f"{entry.key}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return entry.key


def test_list_shows_the_sources(memory):
    table, figures = store("list")
    sizes = {source: sum(entry.nbytes for entry in memory.entries(source)) for source in ("[b].txt", "a.txt")}
    assert figures["sources"] == [
        {"source": "[b].txt", "states": 1, "tokens": 4, "nbytes": sizes["[b].txt"]},
        {"source": "a.txt", "states": 3, "tokens": 52, "nbytes": sizes["a.txt"]},
    ]
    assert "[b].txt" in table
    assert ("bytes" in table, "nbytes" in table, f" {sizes['a.txt']:,} " in table) == (True, False, True)


def test_texts_without_a_source_are_listed(memory, checkpoint):
    """As LangChain's store keeps them."""
    memory.add(GradMemPipeline(*load_checkpoint(checkpoint)), "w5 w6")
    table, figures = store("list")
    assert figures["sources"][0]["source"] is None
    assert "(without a source)" in table


def test_show_takes_a_source_or_a_key(memory):
    table, figures = store("show", "[b].txt")
    (entry,) = memory.entries("[b].txt")
    assert figures["states"][0]["text"] == "w1 w2 w3 w4"
    assert figures["states"][0]["key"] == entry.key
    assert "[b].txt: 0-11" in table
    assert store("show", entry.key)[1] == figures


def test_stats_count_states_sources_and_tokens():
    text, figures = store("stats")
    assert (figures["states"], figures["sources"], figures["tokens"]) == (4, 2, 56)
    assert sum(figures["models"].values()) == 4
    assert f"tokens: 56\nbytes: {figures['nbytes']:,}\n" in text
    (model,) = figures["models"]
    assert text.endswith(f"model {model}: 4\n")


def test_forget_removes_a_source(memory):
    assert json.loads(invoke("store", "forget", "memory", "a.txt", "--json").stdout) == {"removed": 3}
    assert [entry.source for entry in memory.entries()] == ["[b].txt"]
    assert invoke("store", "forget", "memory", "[b].txt").stdout == "removed: 1\n"
    assert store("list") == ("The store is empty.\n", {"sources": []})


def test_verify_names_faults_and_gc_removes_them(memory):
    text, figures = store("verify")
    assert figures == {"ok": True, "states": 4, "damaged": {}, "unlisted": [], "leftovers": []}
    assert text == "Intact and listed correctly: 4 states.\n"
    key = damage(memory, "a.txt")
    (memory.path / "states" / "notes").write_text("a stranger's")
    with memory.index.writing() as connection:
        connection.execute("DELETE FROM states WHERE text = 'w1 w2 w3 w4'")
    text, figures = store("verify", status=1)
    assert (figures["ok"], figures["states"], list(figures["damaged"])) == (False, 2, [key])
    assert len(figures["unlisted"]) == 1
    assert figures["leftovers"] == ["states/notes"]
    assert f"{key} (a.txt: " in text
    assert "`gradmem store gc` corrects the index" in text
    assert json.loads(invoke("store", "gc", "memory", "--json").stdout) == {"removed": [key]}
    assert invoke("store", "gc", "memory").stdout == "removed: 0\n"
    assert store("verify")[1]["states"] == 3


def test_rebuild_replaces_a_damaged_index(memory):
    (memory.path / "index.sqlite").write_bytes(bytes(99))
    for command in ("list", "stats", "verify", "gc"):
        result = invoke("store", command, "memory")
        assert result.exit_code == 2
        assert result.stderr.startswith("gradmem store: ")
        assert "`gradmem store rebuild memory`" in result.stderr
    assert store("rebuild")[1]["states"] == 4
    key = damage(memory, "a.txt")
    assert list(store("rebuild", status=1)[1]["damaged"]) == [key]
    assert len(memory) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "There is no memory store in nowhere"),
        (["list", "a.txt"], "is a file"),
        (["gc", "backbone"], "There is no memory store in backbone"),
        (["show", "memory", "c.txt"], "neither a source nor a state 'c.txt'"),
        (["forget", "memory", "c.txt"], "has no source 'c.txt'"),
        (["mend", "memory"], "No such command 'mend'"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    result = invoke("store", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
