"""Files of rows: what is read, and what is refused with its place."""

import gzip
import json

import pytest

from gradmem_adapter.training import read_rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"context": "a", "query": "b", "target": "c"}\nnot json', "line 2 is not JSON"),
        ('[\n{"context": "a"}\n]', "line 1 is not JSON.*complete JSON object on each line"),
        ("[1]", "line 1 must be an object"),
        ('{"context": "a", "query": "b", "target": ""}', "line 1 has an empty target"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(file)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b'{"context": "a"}' * 99)[:-20], b"{}", b"\x1f\x8b\x08"],
    ids=["cut off", "not a gzip file", "a header alone"],
)
def test_damaged_files_are_named(tmp_path, content):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged"):
        read_rows(file)


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"context": "one\u2028two\x85three", "query": "a", "target": "b"}
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read_rows(file) == [row]
