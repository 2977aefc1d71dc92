"""What commands read: files, directories, patterns, JSON lines and standard input, whatever they hold."""

import gzip
import io
import json
import os

import pytest

from gradmem_adapter.cli import reading
from gradmem_adapter.cli.inputs import Document, Inputs


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(path, data):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def rows(*objects):
    return "".join(json.dumps(row) + "\n" for row in objects)


def read(*paths, **options):
    inputs = Inputs(paths, **options)
    return [(document.source, document.text) for document in inputs], inputs


def test_files_directories_and_patterns():
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.md", ".git/config", ".hidden"):
        put(f"notes/{name}", name)
    put("x[1].txt", "its name is no pattern")
    everything = ["notes/a.md", "notes/b.txt", "notes/sub/c.txt", "notes/sub/deep/d.md"]
    assert [source for source, _ in read("notes")[0]] == everything
    assert [source for source, _ in read("notes/*")[0]] == everything[:2], "a pattern names files, not directories"
    assert [source for source, _ in read("notes/**/*.md", "notes/b.txt")[0]] == [
        everything[0],
        *everything[3:],
        everything[1],
    ]
    assert read("x[1].txt")[0] == [("x[1].txt", "its name is no pattern")]


def test_file_names_and_ids_that_are_not_unicode():
    os.makedirs("notes")
    with open(b"notes/caf\xe9.txt", "w") as file:
        file.write("w1")
    put("rows.jsonl", rows({"text": "w1", "id": "\ud800"}))
    assert read("notes")[0] == [("notes/caf\ufffd.txt", "w1")]
    assert len(read("rows.jsonl", source_field="id")[1].refused) == 1


def test_the_store_is_not_read_as_input(tmp_path):
    put("a.txt", "a")
    put("memory/b.txt", "b")
    assert read(".", without=tmp_path / "memory")[0] == [("./a.txt", "a")]


def test_json_lines_are_named_by_line_or_by_a_field():
    lines = rows({"text": "one", "id": "first"}) + "\n" + rows({"text": "two", "id": "second"})
    put("rows.jsonl", "\ufeff" + lines)
    put("more.ndjson.gz", gzip.compress(lines.encode()))
    assert read("rows.jsonl")[0] == [("rows.jsonl:1", "one"), ("rows.jsonl:3", "two")]
    assert read("more.ndjson.gz", source_field="id")[0] == [("first", "one"), ("second", "two")]
    assert [text for _, text in read("rows.jsonl", text_field="id")[0]] == ["first", "second"]


@pytest.mark.parametrize(
    ("json_lines", "expected"), [(False, ("stdin", '{"text": "w1"}\n')), (True, ("stdin:1", "w1"))]
)
def test_standard_input(monkeypatch, json_lines, expected):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "w1"}\n')))
    assert read("-", json_lines=json_lines)[0] == [expected]


def test_documents_are_read_one_at_a_time():
    put("a.txt", "a")
    put("rows.jsonl", rows({"text": "one"}))
    documents = iter(Inputs(["a.txt", "rows.jsonl"]))
    assert next(documents) == Document("a.txt", "a")
    put("rows.jsonl", rows({"text": "another"}))
    assert next(documents) == Document("rows.jsonl:1", "another")


BAD = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n", "is empty"),
    "binary.dat": (b"\x00\xff" * 9, "is not a text in UTF-8"),
    "zero.dat": (b"w1\0w2", "zero.dat has a zero byte at position 2, so it is not plain text"),
    "latin1.txt": ("z\xe4h ".encode("latin-1") * 99, "is not a text in UTF-8"),
    "mixed.txt": (b"w1 " * 9000 + "\xe4 ".encode() + b"\xe4 ", "can't decode byte 0xe4 in position 27003"),
    "utf16.txt": ("w1".encode("utf-16"), "is not a text in UTF-8"),
    "report.pdf": (
        b"%PDF-1.4\nwithout a byte that is none of a text",
        "is a PDF, not plain text. Extract its text first",
    ),
    "report.docx": (b"PK\x03\x04\x14\x00\x06\x00", "is a zip archive, as .docx, .odt and .epub are, not plain text"),
    "none.txt.gz": (b"w1 w2", "is damaged or not a gzip file"),
    "cut.jsonl.gz": (gzip.compress(rows({"text": "w1"}).encode() * 99)[:-9], "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_files_given_by_name_are_refused_and_the_others_read(name):
    put(name, BAD[name][0])
    put("good.txt", "w1")
    found, inputs = read(name, "missing.txt", "no*.txt", "good.txt")
    assert found[-1] == ("good.txt", "w1")
    assert BAD[name][1] in inputs.refused[0]
    assert inputs.refused[0].startswith(name)
    assert "missing.txt" in inputs.refused[1]
    assert inputs.refused[2] == "No file matches 'no*.txt'."
    with pytest.raises(ValueError, match=name):
        Inputs([name, "good.txt"]).read_all()


def test_files_found_in_a_directory_may_be_empty_or_not_text():
    for name, (data, _) in BAD.items():
        put(f"all/{name}", data)
    put("all/good.txt", "w1")
    os.mkfifo("all/pipe.txt")
    found, inputs = read("all")
    assert ("all/good.txt", "w1") in found
    assert inputs.passed_over == [
        f"all/{name}" for name in ("binary.dat", "empty.txt", "report.docx", "report.pdf", "zero.dat")
    ]
    assert len(inputs.refused) == 6, "what is a text, or meant to be one, is named"


def test_an_empty_directory_beside_texts_is_refused():
    put("good.txt", "w1")
    os.makedirs("bare/.hidden")
    found, inputs = read("good.txt", "bare")
    assert found == [("good.txt", "w1")]
    assert inputs.refused == ["There is no text in bare: it has no files."]


def test_bad_lines_are_named_and_the_other_lines_read():
    put(
        "rows.jsonl",
        rows({"text": "w1"}) + "{\n[]\n" + rows({"context": "w2"}, {"text": 3}, {"text": " "}, {"text": "\ud800"}),
    )
    with open("rows.jsonl", "ab") as file:
        file.write(b'{"text": "\xe4"}\n' + rows({"text": "w9"}).encode())
    found, inputs = read("rows.jsonl")
    assert found == [("rows.jsonl:1", "w1"), ("rows.jsonl:9", "w9")]
    words = [
        "not JSON",
        "is a list",
        "has the fields context. Choose other fields with --text-field",
        "with a text in the field 'text'",
        "is empty",
        "half",
        "UTF-8",
    ]
    assert len(inputs.refused) == len(words)
    for number, (line, said) in enumerate(zip(inputs.refused, words, strict=True), 2):
        assert said in line
        assert line.startswith((f"rows.jsonl, line {number}", f"rows.jsonl:{number}"))


def test_inputs_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    put("long.txt", "w1 " * 400)
    put("rows.jsonl", rows({"text": "w1"}, {"text": "w" * 2000}, {"text": "w2"}))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w1 " * 400)))
    found, inputs = read("long.txt", "rows.jsonl", "-")
    assert found == [("rows.jsonl:1", "w1")]
    assert [line.split(" has ")[0] for line in inputs.refused] == ["long.txt", "rows.jsonl, line 2", "Standard input"]
